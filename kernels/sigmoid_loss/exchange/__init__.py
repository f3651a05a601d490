"""How texts meet the images of other ranks: what is chosen and agreed, and the four forms of exchange."""
