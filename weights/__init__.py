"""Small trained networks, ready for use: `--ckpt_path weights/lenet.ckpt`. What they score is in weights.json."""
