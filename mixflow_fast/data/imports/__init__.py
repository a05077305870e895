"""Reading sets of other programs, to make sets of ours of them."""
