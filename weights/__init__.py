"""Small trained networks, ready for use: `--ckpt_path weights/lenet.ckpt`. Their scores are in weights.json."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent
