"""`siglip-data emoji-table`: names of emoji in many languages as a table to pack."""
