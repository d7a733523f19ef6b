"""The networks that methods attach to: timm's ViT, open_clip's CLIP."""
