"""Checks an answer to one of the exercises on the pages in docs/.

    python -m docs.course.check                            # the exercises
    python -m docs.course.check lenet-2                    # check docs/course/answers/lenet_2.py
    python -m docs.course.check lenet-2 my_answer.py       # or a file elsewhere

The first check of an exercise puts its starting point into docs/course/answers/; edit that file and check again. It
takes a minute at most. Exit code 0: solved; 1: not yet; 2: a mistake in the command or an error in the answer.
"""

import importlib.util
import locale
import os
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import yaml

from docs.course.exercises import EXERCISES, LIMIT, Finding
from errors import OneLineParser, UserError, one_line, print_error, run_program, shown

COURSE = Path(__file__).resolve().parent
TEXTS = yaml.safe_load((COURSE / "texts.yaml").read_text(encoding="utf-8"))


def findings(name: str, path: Path) -> list[Finding]:
    """Check the answer in a file.

    Raises:
        UserError: If the file can't be run, with the line where it fails.
    """
    exercise = EXERCISES[name]
    spec = importlib.util.spec_from_file_location("answer", path)
    try:
        if spec is None or spec.loader is None:  # of a recipe
            return list(exercise.check(path))
        answer = sys.modules["answer"] = importlib.util.module_from_spec(spec)  # so that its classes can be pickled
        spec.loader.exec_module(answer)
        return list(exercise.check(answer))
    except UserError:
        raise
    except Exception as error:  # whatever the learner's own code raises
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == str(path) else []
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {one_line(str(error))}") from None


def report(name: str, found: list[Finding], language: int) -> str:
    """What is right and what to look at, a line for each finding."""
    common, texts = TEXTS["common"], TEXTS[name]
    lines = []
    for finding in found:
        kind = "right" if finding.right else "look"
        text = texts[finding.text][kind][language].format(**finding.values)
        lines.append(f"  {common[kind][language]}  {text}")
    all_right = all(finding.right for finding in found)
    return "\n".join([*lines, common["done" if all_right else "again"][language].format(name=name)])


def main(arguments: list[str]) -> int:
    """Check one answer; returns the exit code."""
    return run_program("check", lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
    parser = OneLineParser(prog="python -m docs.course.check", description="Checks the answer to an exercise.")
    parser.add_argument("exercise", nargs="?", help="its name, like lenet-2; without it they are listed")
    parser.add_argument("answer", nargs="?", type=Path, help="your file (default: in docs/course/answers)")
    parser.add_argument("--language", choices=("en", "zh-CN"), help="of the report (default: that of the locale)")
    options = parser.parse_args(arguments)
    wanted = [options.language, *map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG")), locale.getlocale()[0]]
    spoken = next(filter(None, wanted), "")
    language = int(spoken.startswith(("zh", "Chinese")))
    if options.exercise is None:
        print("\n".join(f"{name:12} {TEXTS[name]['title'][language]}" for name in EXERCISES))
        return 0
    path = _file(options.exercise, options.answer)
    warnings.filterwarnings("ignore")  # Lightning's, about settings that are intended
    with _stopped_in_time(path) if path.suffix == ".py" else nullcontext():
        found = findings(options.exercise, path)
    print(f"{options.exercise}: {shown(path)}\n{report(options.exercise, found, language)}")
    return int(not all(finding.right for finding in found))


def _file(name: str, given: Path | None) -> Path:
    if name not in EXERCISES:
        raise UserError(f"there is no exercise {name!r}; there are: {', '.join(EXERCISES)}")
    file = name.replace("-", "_") + EXERCISES[name].suffix
    path = given or COURSE / "answers" / file
    if given is None and not path.exists():
        path.parent.mkdir(exist_ok=True)
        shutil.copyfile(COURSE / "start" / file, path)
    if not path.is_file() or path.suffix != EXERCISES[name].suffix:
        raise UserError(f"{path}: a {EXERCISES[name].suffix} file with the answer was expected")
    return path.resolve()


@contextmanager
def _stopped_in_time(path: Path) -> Iterator[None]:
    def stop() -> None:
        print_error("check", f"{path}: not finished after {LIMIT} s; is there an endless loop?")
        os._exit(1)

    timer = threading.Timer(LIMIT, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
