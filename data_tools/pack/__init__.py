"""`siglip-data pack`: the command; what packs stands in siglip_train.data.packing."""
