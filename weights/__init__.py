"""Small trained networks, ready for use: `--ckpt_path weights/lenet.ckpt`. Their scores are in weights.json."""
