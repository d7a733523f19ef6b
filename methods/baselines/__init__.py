"""Bounds and baselines: plain fine-tuning, joint training, LoRA, BitFit, zero-shot CLIP."""
