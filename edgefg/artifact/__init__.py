"""The artifact contract: manifest, golden set, signature and TensorRT plan information. No torch."""
