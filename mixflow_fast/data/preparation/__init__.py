"""From images as they were published to sets that training reads: prepared images and latents."""
