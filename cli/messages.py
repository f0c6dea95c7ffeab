"""Turns the argument parser's messages, several lines of nested types, into one line that a person can act on."""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping

from cli.recipes import did_you_mean
from errors import one_line

KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
# Of SequentialLR and ChainedScheduler, behind their names.
MADE_OF_SCHEDULES = (
    "is made of other schedules, which settings can't hold: write a class in a Python file that derives from it and "
    "makes them of the optimiser, and name that; or take lit_modules.schedules.WarmupDecay"
)


def explain(message: str, given: Mapping[str, str], known: Iterable[str]) -> str:
    """One line that names the setting, its value and what was expected.

    Args:
        message: What jsonargparse says.
        given: Dotted name of each setting that the user made, and the file that holds it ("" for a flag).
        known: Dotted names of the settings that exist.
    """
    message = one_line(message)
    if match := re.match(r"unrecognized arguments: -*([^\s=]+)", message):
        hint = did_you_mean(match[1], known).replace("mean ", "mean --")
        return f"unknown flag --{match[1]}{hint}"
    if re.search(r"arguments are required: model\.net\b", message):
        return "no network is named: add --model RECIPE, or --model.net CLASS"
    # A class's own parser reports inside the report of the setting that names the class.
    keys = re.findall(r'Parser key "([^"]*)": ', message)
    body = re.split(r'Parser key "[^"]*": ', message)[-1]
    if match := re.search(r"(?:does not accept option|Option) '([^']+)'", body):
        name, where = _full_name([*keys, match[1]], given)
        return f"{where}unknown setting {name}{_argument_like(match[1], message) or did_you_mean(name, known)}"
    if keys:
        name, where = _full_name(keys, given)
        if schedule := re.search(r"torch\.optim\.lr_scheduler\.(SequentialLR|ChainedScheduler)\b", message):
            return f"{where}{schedule[0]} {MADE_OF_SCHEDULES}"
        value, reason = _value_and_reason(name, body)
        return f"{where}{name}={value} is not valid: {reason}"
    return message


def own_words(message: str) -> str:
    """One line: of a class in a list what it says itself, without the types that the parser tried beside the list."""
    message = one_line(message)
    kinds = "Not a valid|Expected"
    said = re.match(rf"Does not validate against .*? Errors: - (?!{kinds})(.+?) - (?:{kinds})", message)
    said = said or re.search(rf"(Problem with given class_path .+?) - (?:{kinds})", message)
    return said[1] if said else message


def _full_name(keys: list[str], given: Mapping[str, str]) -> tuple[str, str]:
    """The setting that the parsers name part by part, as the user wrote it, and 'FILE: ' where a file holds it."""
    path = ".".join(keys)
    for name in given:
        if name.replace(".init_args", "") == path or (len(keys) == 1 and name.endswith(f".{path}")):
            return name, f"{given[name]}: " if given[name] else ""
    return path, ""


def _argument_like(name: str, message: str) -> str:
    """A similar argument of the class that the message is about."""
    match = re.search(r"class_path[= ]'([\w.]+)'", message)
    module, _, class_name = match[1].rpartition(".") if match else ("", "", "")
    found = getattr(sys.modules.get(module), class_name, None)
    return did_you_mean(name, inspect.signature(found).parameters) if found else ""


def _value_and_reason(name: str, body: str) -> tuple[str, str]:
    body = re.sub(r"(value: .*?)\.? Got value: .*", r"\1", body)  # the innermost value is the user's
    found = re.search(r"(?:Got|Given) value: (.*)$", body) or re.search(r"Expected a path but (\S+)", body)
    value = found[1] if found else "..."
    if class_path := re.match(r"Namespace\(class_path='([^']+)'", value):
        value = class_path[1]
    if match := re.search(r"arguments are required: ([\w, ]+?) - ", f"{body} - "):
        first = match[1].partition(",")[0]
        length = " (-1 takes the length of the run)" if first in ("T_max", "total_steps", "total_iters") else ""
        return value, f"it needs {match[1]}; set --{name}.init_args.{first}{length}"
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", body):
        module = sys.modules.get(match[1])
        return value, f"{match[1]} has no {match[2]}{did_you_mean(match[2], dir(module))}"
    if match := re.search(r"No module named '([\w.]+)'", body):
        return value, f"there is no module {match[1]} here (the working folder was searched too)"
    if match := re.search(r"Import path \S+ does not correspond to a subclass of (\w+)", body):
        return value, f"it is not a subclass of {match[1]}"
    if " Subclass types expect one of" in value:
        return value.partition(" Subclass types expect")[0], "the name of a class was expected"
    texts = re.findall(r"Expected an? (.+?)(?=\.? (?:- |Got value|Given value)|$)", body)
    expected = list(dict.fromkeys(kind for text in texts for kind in _kinds(text)))
    if not expected:
        return value, body
    if expected == ["null"]:  # the parser can't tell which class a short name means
        return value, "a class was expected, by its full name like torch.optim.lr_scheduler.StepLR, or null"
    if "a number" in expected and "the name of a class" in expected:
        expected.remove("the name of a class")  # of a tensor, which a setting can't name
    return value, f"{', '.join(expected[:-1])}{' or ' if expected[1:] else ''}{expected[-1]} was expected"


def _kinds(text: str) -> list[str]:
    """A type in words; empty for types that the parser only tries in passing."""
    if text.startswith("path but"):
        return []
    if text.startswith("dot import path"):
        return ["the name of a class"]
    if match := re.match(r"typing\.Literal\[(.*)\]", text):
        return match[1].replace("'", "").split(", ")
    name = text.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
    return [KINDS.get(name, f"a value of type {name}")]
