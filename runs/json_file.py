"""A JSON file that is there whole or not at all."""

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Write beside the file, then put that in its place: who reads meanwhile, or after a kill, finds a whole one."""
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
