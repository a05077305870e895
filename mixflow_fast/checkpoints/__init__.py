"""What a run leaves on disk: written safely, checked, resumed, consolidated, exported."""
