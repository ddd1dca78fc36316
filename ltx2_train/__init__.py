"""Pretrain and fine-tune LTX-2, the open audio-video diffusion transformer."""
