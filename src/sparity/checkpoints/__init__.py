"""Checkpoints: safetensors files, Hugging Face folders, packed and legacy sparse layouts."""
