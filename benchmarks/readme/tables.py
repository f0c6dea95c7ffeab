"""The tables of the READMEs and the results in docs/, written from the records.

What stands between `<!-- results FAMILY -->` and `<!-- /results -->` becomes the table of that family of entries, and
after `<!-- results MODULE -->`, in a page of docs/, that of the entries whose network is in models/MODULE.py.
`<!-- throughput DEVICE -->` and `<!-- measured DEVICE -->` are the tables of the benchmarks. Where a record is missing,
so is its line or its cell.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from benchmarks.harness.side_by_side import PROJECT
from benchmarks.readme.entries import Entry, Results
from benchmarks.readme.rounding import accuracies, down, duration, mean_and_range, share, span, up
from errors import UserError
from runs.reading import Run

README, CHINESE = PROJECT / "README.md", PROJECT / "README.zh-CN.md"
REGION = re.compile(r"(<!-- (results|throughput|measured) (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
OPENING = re.compile(r"<!-- (?:results|throughput|measured) ")
# A run that ends below this has not learnt: chance is 0.1.
COLLAPSED = 0.15
# Contestants of benchmarks.throughput, in the table's order; {} is the version.
PEERS = {
    "tutorial": ("times the tutorial's loop", "相对教程循环的加速比"),
    "d2l": ("times d2l {}", "相对 d2l {} 的加速比"),
    "references": ("times torchvision's style", "相对 torchvision 风格循环的加速比"),
    "timm": ("times timm {}", "相对 timm {} 的加速比"),
}
FAMILY_HEADERS = (
    "recipe | network | input | parameters | FLOPs an image | epochs | published | here: mean ± deviation (range) | "
    "seeds (collapsed) | training",
    "配方 | 网络 | 输入 | 参数量 | 每张图的 FLOPs | 轮数 | 公开结果 | 本项目：均值 ± 标准差（范围） | "
    "种子数（训练失败） | 训练时间",
)
BEST_HEADERS = (
    "recipe | input | parameters | FLOPs an image | epochs | published | 55,000 images | all 60,000 | "
    "all, flip-averaged | seeds (collapsed) | training",
    "配方 | 输入 | 参数量 | 每张图的 FLOPs | 轮数 | 公开结果 | 55,000 张 | 全部 60,000 张 | "
    "全部，水平翻转平均（TTA） | 种子数（训练失败） | 训练时间",
)
MODULE_HEADERS = (
    "command | test accuracy | seeds (collapsed) | published | training",
    "命令 | 测试准确率 | 种子数（训练失败） | 公开结果 | 训练时间",
)
NOT_MEASURED = ("not measured yet", "尚未测量")
NETWORKS = {"lenet": "LeNet", "alexnet": "AlexNet", "vgg11": "VGG-11", "nin": "NiN", "googlenet": "GoogLeNet"}


class Language(NamedTuple):
    """Which of several texts is meant, and what stands between the ends of a range."""

    number: int
    to: str


def pages() -> list[Path]:
    """The files that have tables to write."""
    files = [README, CHINESE, *sorted((PROJECT / "docs").glob("*.md")), *sorted((PROJECT / "docs/zh-CN").glob("*.md"))]
    return [path for path in files if OPENING.search(path.read_text(encoding="utf-8"))]


def written(path: Path, results: Results, folder: Path) -> str:
    """A page's text with its tables as the records have it.

    Args:
        path: The page.
        results: The records of runs.
        folder: Where those of the benchmarks lie.

    Raises:
        UserError: If a region has no end, or an unknown name.
    """
    text = path.read_text(encoding="utf-8")
    language = Language(1, "–") if path.name == CHINESE.name or path.parent.name == "zh-CN" else Language(0, " to ")
    if len(OPENING.findall(text)) != len(REGION.findall(text)):
        raise UserError(f"{path.name}: a <!-- results ... --> or other region has no end, or not one name")

    def fill(region: re.Match[str]) -> str:
        opening, kind, name, end = region.groups()
        if kind == "results":
            table = results_table(name, results, language)
        elif kind == "throughput":
            table = throughput_table(_read(folder, f"throughput-{name}"), language)
        else:
            table = measured_table(folder, name, language)
        return f"{opening}{table}\n{end}"

    return REGION.sub(fill, text)


def results_table(name: str, results: Results, language: Language) -> str:
    """The Markdown table of a family, or of the entries with a network of one module.

    Raises:
        UserError: If there is neither.
    """
    if name in {entry.family for entry in results.entries}:
        entries = [entry for entry in results.entries if entry.family == name]
        return _best(entries, results, language) if name == "best" else _family(entries, results, language)
    module = f"models.{name}."
    shown = [entry for entry in results.entries if entry.family != "short"]
    of_module = [entry for entry in shown if entry.config["model"]["net"]["class_path"].startswith(module)]
    if not of_module:
        raise UserError(f"there is no family and no network {name!r} to show results of")
    rows = []
    for entry in of_module:
        for device in results.devices:
            if runs := results.of(entry, device):
                command = " ".join(["python train.py --model", entry.recipe, *entry.flags])
                rows.append((f"`{command}`", *_score(runs, language), _published([entry]), _time(runs, device)))
    header = MODULE_HEADERS[language.number].split(" | ")
    return _markdown([header, *rows], left=1) if rows else NOT_MEASURED[language.number]


def _family(entries: Sequence[Entry], results: Results, language: Language) -> str:
    header = FAMILY_HEADERS[language.number].split(" | ")
    rows = []
    for _, line in groupby(entries, key=lambda entry: entry.line):
        alike = list(line)
        network = alike[0].network[language.number : language.number + 1] or [_class(alike[0])]
        model = (network[0], *_model(alike, language), _published(alike))
        for device in [device for device in results.devices if results.of(alike[0], device)] or [""]:
            runs = results.of(alike[0], device) if len(alike) == 1 else []
            rows.append((_recipes(alike), *model, *_score(runs, language), _time(runs, device)))
    return _markdown([header, *rows], left=2)


def _best(entries: Sequence[Entry], results: Results, language: Language) -> str:
    header = BEST_HEADERS[language.number].split(" | ")
    rows = []
    for recipe in dict.fromkeys(entry.recipe for entry in entries):
        split, full = sorted((entry for entry in entries if entry.recipe == recipe), key=lambda entry: entry.images)
        model = (_recipes([full]), *_model([full], language), _published([full]))
        for device in [name for name in results.devices if results.of(split, name) or results.of(full, name)] or [""]:
            parts = [results.of(entry, device) for entry in (split, full)]
            (first, seeds), (second, more_seeds) = (_score(runs, language) for runs in parts)
            flipped = mean_and_range(accuracies(parts[1], "accuracy_flip"), language.to)
            counts = ", ".join(filter(None, (seeds, more_seeds)))
            rows.append((*model, first, second, flipped, counts, _time(parts[1] or parts[0], device)))
    return _markdown([header, *rows], left=1)


def throughput_table(record: dict[str, Any] | None, language: Language) -> str:
    """Images a second of training, and how many times those of the others.

    Args:
        record: What benchmarks.throughput wrote, or None.
        language: Of the table.
    """
    if not record:
        return NOT_MEASURED[language.number]
    networks = [{one["contestant"]: one for one in entry["contestants"]} for entry in record["results"]]
    peers = [name for name in PEERS if any(name in network for network in networks)]
    header = [("network, input, batch", "网络，输入，批量大小")[language.number]]
    header.append(("ours, images/s", "本项目（张/秒）")[language.number])
    bf16 = any("ours_bf16" in network for network in networks)
    header += [("in bfloat16", "bfloat16")[language.number]] if bf16 else []
    header.append(("share of the machine's peak (aim)", "占机器峰值的比例（目标）")[language.number])
    header.append(("peak memory, GiB", "峰值内存（GiB）")[language.number])
    header += [PEERS[name][language.number].format(record["versions"].get(name, "")) for name in peers]
    rows = []
    for entry, contestants in zip(record["results"], networks, strict=True):
        network = NETWORKS.get(entry["network"], entry["network"])
        cells = [f"{network}, {entry['image_size']}, {entry['batch_size']}", _rate(contestants.get("ours"))]
        if bf16:
            cells.append(_rate(contestants.get("ours_bf16")))
        ours, aim = contestants["ours"], entry["target_share_of_peak"]
        cells.append(down(ours["share_of_peak"], 2) + (f" ({aim:g})" if aim else ""))
        cells.append(up(ours["peak_memory_bytes"] / 2**30, 1))
        for name in peers:
            cells.append(_ratio(contestants[name]["ours_over_this"], language.to) if name in contestants else "")
        rows.append(cells)
    return _markdown([header, *rows], left=1)


def measured_table(folder: Path, device: str, language: Language) -> str:
    """What the other benchmarks have measured: a line for each whose record is there."""
    rows = []
    for line in LINES:
        if "{}" not in line.record and device != "cpu":
            continue  # where it ran makes no difference
        record = _read(folder, line.record.format(device))
        if record and (result := line.result(record)):
            rows.append((line.what[language.number], result[language.number], f"`python -m benchmarks.{line.command}`"))
    header = (("what", "result", "command"), ("项目", "结果", "命令"))[language.number]
    return _markdown([header, *rows], left=3) if rows else NOT_MEASURED[language.number]


class Line(NamedTuple):
    """A line of the table of measurements: record, command, what (English, Chinese), and the result from the record."""

    record: str
    command: str
    what: tuple[str, str]
    result: Callable[[dict[str, Any]], tuple[str, str] | None]


def _loader(record: dict[str, Any]) -> tuple[str, str]:
    ratios = [(entry["image_size"], down(entry["ours_over_pil"]["median"], 1)) for entry in record["results"]]
    (size, first), *others = ratios
    english = [f"{first} times at {size} pixels", *(f"{ratio} at {size}" for size, ratio in others)]
    return ", ".join(english), "，".join(f"{size} 像素 {ratio} 倍" for size, ratio in ratios)


def _overhead(record: dict[str, Any]) -> tuple[str, str]:
    bar = [entry for entry in record["results"] if entry["contestant"] == "ours, bar on a terminal"]
    times = [(entry["batch_size"], up(entry["time_over_bare_loop"]["median"], 2)) for entry in bar]
    aims = [f"{entry['target']:g}" for entry in bar]
    (size, first), *others = times
    english = [f"{first} times at batch {size}", *(f"{ratio} at {size}" for size, ratio in others)]
    chinese = "，".join(f"批量 {size}：{ratio} 倍" for size, ratio in times)
    answers = f"{', '.join(english)} (aims: {', '.join(aims)})", f"{chinese}（目标 {'、'.join(aims)}）"
    kept = [over for entry in bar if (over := entry.get("time_over_bare_loop_with_kept_memory"))]
    if not kept:
        return answers
    ratios = [up(over["median"], 2) for over in kept]
    return (
        f"{answers[0]}; over one that keeps freed memory as ours does: {', '.join(ratios)}",
        f"{answers[1]}；与同样保留已释放内存的最简训练循环相比：{'、'.join(ratios)} 倍",
    )


def _freed_memory(record: dict[str, Any]) -> tuple[str, str]:
    times = [(entry["recipe"], down(entry["times_as_fast"]["median"], 2)) for entry in record["results"]]
    english = ", ".join(f"{ratio} times for `{recipe}`" for recipe, ratio in times)
    return english, "，".join(f"`{recipe}` {ratio} 倍" for recipe, ratio in times)


def _startup(record: dict[str, Any]) -> tuple[str, str]:
    medians = {name: median(entry["seconds"]) for name, entry in record["results"].items()}
    *answers, lightning, step = medians.values()
    answer, first, alone = up(max(answers), 2), up(step, 2), down(lightning, 2)
    return (
        f"{answer} s; {first} s (importing Lightning alone: {alone} s)",
        f"{answer} 秒；{first} 秒（仅导入 Lightning 就要 {alone} 秒）",
    )


def _speedrun(record: dict[str, Any]) -> tuple[str, str]:
    english, chinese = [], []
    for entry in record["results"]:
        reached, seconds = down(100 * entry["mean_accuracy"], 2), up(entry["mean_seconds"], 1)
        if "peer" in entry:
            english.append(f"{reached} % in {seconds} s ({entry['peer']}-style loop)")
            chinese.append(f"{seconds} 秒达到 {reached}%（{entry['peer']} 风格的循环）")
            continue
        wanted, limit = f"{entry['accuracy_wanted']:g}", entry["limit_seconds"]
        aim = (f"; aim: {wanted} % in {limit:g} s", f"；目标 {limit:g} 秒内 {wanted}%") if limit else ("", "")
        english.append(f"{reached} % in {seconds} s (`{entry['recipe']}`{aim[0]})")
        chinese.append(f"{seconds} 秒达到 {reached}%（`{entry['recipe']}`{aim[1]}）")
    return ", ".join(english), "，".join(chinese)


def _precision(record: dict[str, Any]) -> tuple[str, str]:
    english, chinese = [], []
    for entry in record["results"]:
        compared = entry["compared"]
        plain, bf16 = (down(100 * compared["mean_accuracy"][name], 2) for name in ("32", "bf16-mixed"))
        times = down(compared["times_as_fast"]["median"], 2)
        agree = {True: ("agree", "一致"), False: ("differ", "不一致"), None: ("one seed", "单个种子")}[
            compared["agree"]
        ]
        english.append(f"{entry['network']}: {bf16} and {plain} % ({agree[0]}), {times} times as fast")
        network = entry["network"].replace(", ", "，").replace(" pixels", " 像素")
        chinese.append(f"{network}：{bf16}% 与 {plain}%（{agree[1]}），速度 {times} 倍")
    return "; ".join(english), "；".join(chinese)


def _step(record: dict[str, Any]) -> tuple[str, str]:
    english, chinese = [], []
    for entry in record["results"]["networks"]:
        name, step, peak = NETWORKS[entry["network"]], entry["share_of_step"], entry["share_of_peak"]
        part, speed = down(step["convolution"], 2), down(peak["convolution"], 2)
        english.append(f"{name}: convolutions {part} (at {speed} of the peak)")
        chinese.append(f"{name}：卷积 {part}（为峰值的 {speed}）")
        if step["linear"] >= 0.01:
            part, speed = down(step["linear"], 2), down(peak["linear"], 2)
            english[-1] += f", linear layers {part} (at {speed})"
            chinese[-1] += f"、全连接 {part}（{speed}）"
    return "; ".join(english), "；".join(chinese)


def _scaling(record: dict[str, Any]) -> tuple[str, str]:
    results = record["results"]
    *_, (devices, efficiency) = results["efficiency"].items()
    ratio, model = down(efficiency, 2), results["model"]
    return (
        f"{ratio} of the ideal with {devices} devices (`{model}`)",
        f"{devices} 个设备时为理想值的 {ratio}（`{model}`）",
    )


def _pictures(record: dict[str, Any]) -> tuple[str, str]:
    ratio, aim = up(record["results"]["ratio"]["median"], 3), f"{record['results']['target']:g}"
    return f"{ratio} times at batch 256 (aim: {aim})", f"批量 256：{ratio} 倍（目标 {aim}）"


def _kills(record: dict[str, Any]) -> tuple[str, str]:
    kills, valid = record["kills_while_writing"]["kills"], record["kills_while_writing"]["valid_afterwards"]
    return f"{valid} times of {kills} a valid newest checkpoint", f"{kills} 次中 {valid} 次最新检查点完好"


def _continued(record: dict[str, Any]) -> tuple[str, str] | None:
    runs = [record["kills_of_training"], record["stops_of_training"]]
    if not all(run["bit_equal"] for run in runs):
        return "weights not bit-equal to the uninterrupted run", "权重与不中断时并非逐位相同"
    kills, stops = (run["interruptions"] for run in runs)
    return (
        f"after {kills} SIGKILLs and {stops} SIGTERMs bit-equal to the uninterrupted run",
        f"{kills} 次 SIGKILL 和 {stops} 次 SIGTERM 后，权重与不中断时逐位相同",
    )


LINES = (
    Line(
        "data_path-{}",
        "data_path",
        (
            "loader with shuffle, augmentation, resize, against PIL with workers",
            "数据加载（打乱、增强、缩放），与 PIL 多进程加载相比",
        ),
        _loader,
    ),
    Line(
        "trainer_overhead-{}",
        "trainer_overhead",
        (
            "LeNet's epoch with bar, logs, metrics, checkpoints, over a bare loop",
            "LeNet 每轮用时（含进度条、日志、指标、检查点），与最简训练循环相比",
        ),
        _overhead,
    ),
    Line(
        "freed_memory-{}",
        "freed_memory",
        (
            "training speed with freed memory kept for the next step, against glibc's default",
            "保留已释放的内存供下一步使用，与 glibc 默认行为相比的训练速度",
        ),
        _freed_memory,
    ),
    Line(
        "startup-{}",
        "startup",
        (
            "`--help` and plain mistakes; command to first optimiser step",
            "`--help` 和命令写错时的响应；从命令到第一步更新",
        ),
        _startup,
    ),
    Line(
        "tensorboard_cost-{}",
        "tensorboard_cost",
        (
            "LeNet's epoch with all of TensorBoard's pictures, over one without",
            "LeNet 每轮用时：绘制全部 TensorBoard 图片，与不绘制相比",
        ),
        _pictures,
    ),
    Line(
        "speedrun-{}",
        "speedrun",
        (
            "seconds of training to a test accuracy, mean of the seeds",
            "达到某测试准确率所需的训练秒数（多个种子的均值）",
        ),
        _speedrun,
    ),
    Line(
        "precision-{}",
        "precision",
        (
            "test accuracy in bfloat16 and in float32, means of the seeds",
            "bfloat16 与 float32 的测试准确率（多个种子的均值）",
        ),
        _precision,
    ),
    Line(
        "step_profile-{}",
        "step_profile",
        (
            "share of a step (of large matrix products' peak) under the profiler",
            "性能分析器下各类运算占一步的比例（及其相对大矩阵乘法峰值的速度）",
        ),
        _step,
    ),
    Line("scaling-{}", "scaling", ("images a second of several devices", "多设备的训练速度"), _scaling),
    Line("reliability", "reliability", ("kills while a checkpoint was written", "写检查点时杀掉进程"), _kills),
    Line(
        "reliability",
        "reliability",
        ("weights of a run that was interrupted and continued", "训练中断后继续"),
        _continued,
    ),
)


def _recipes(entries: Sequence[Entry]) -> str:
    return " ".join(f"`{entry.recipe}`" for entry in entries)


def _class(entry: Entry) -> str:
    return entry.config["model"]["net"]["class_path"].rpartition(".")[2]


def _model(entries: Sequence[Entry], language: Language) -> tuple[str, ...]:
    """Input, parameters, FLOPs and epochs, from the configurations and the networks themselves."""
    configs = [entry.config for entry in entries]
    parameters, flops = zip(*(entry.size for entry in entries), strict=True)
    columns = (
        [str(config["data"]["image_size"]) for config in configs],
        [f"{count:,}" if len(set(parameters)) == 1 else f"{count / 1e6:.1f} M" for count in parameters],
        [f"{count / 1e6:.2f} M" if count < 1e7 else f"{count / 1e9:.2f} G" for count in flops],
        [str(config["trainer"]["max_epochs"]) for config in configs],
    )
    return tuple(span(column, language.to) for column in columns)


def _published(entries: Sequence[Entry]) -> str:
    values = [share(f"{entry.published:.3f}") for entry in entries if entry.published is not None]
    return span(values) if values else ""


def _score(runs: Sequence[Run], language: Language) -> tuple[str, str]:
    """Test accuracy, and how many seeds have how many collapsed among them."""
    if not runs:
        return "", ""
    values = accuracies(runs)
    return mean_and_range(values, language.to), f"{len(values)} ({sum(value < COLLAPSED for value in values)})"


def _time(runs: Sequence[Run], device: str) -> str:
    runs = [run for run in runs if "background" not in run.record]  # a time measured beside other work says nothing
    if not runs:
        return ""
    place = " / ".join(dict.fromkeys(run.machine.removeprefix("NVIDIA ") for run in runs)) if device == "gpu" else "CPU"
    return f"{duration(fmean(run.record['fit_seconds'] for run in runs))}, {place}"


def _rate(ours: dict[str, Any] | None) -> str:
    rate = ours["images_per_second"] if ours else None
    return "" if rate is None else down(rate, 0 if rate >= 10 else 1)


def _ratio(ratio: dict[str, float], to: str) -> str:
    middle, least, greatest = (down(ratio[key], 2) for key in ("median", "least", "greatest"))
    return f"{middle} ({least}{to}{greatest})"


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _markdown(rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    return "\n".join(
        "|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in (rows[0], rule, *rows[1:])
    )
