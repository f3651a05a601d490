"""What a config gets beyond what is written in it: values filled in, an explanation of its keys, limits on trust."""
