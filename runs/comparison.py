"""What compare.py does with a checked command line."""

from errors import UserError, plain, print_error
from runs.groups import fold
from runs.reading import find_runs
from runs.report import print_table, write_report
from runs.training import Request, train_missing


def compare(request: Request) -> int:
    """Train what is missing, show the table, write the report; returns the exit code.

    Raises:
        UserError: If there is nothing to compare, or the configuration of a run to train is not valid.
    """
    failed: list[str] = []
    if request.recipes:
        runs, failed = train_missing(request)
    else:
        if not request.paths and not request.log_dir.exists():
            raise UserError(f"there are no runs in {request.log_dir}; start with: python train.py --model lenet")
        runs = find_runs(request.paths or [request.log_dir])
    finished = [run for run in runs if run.finished]
    if not finished and not failed:
        where = ", ".join(map(str, request.paths or [request.log_dir]))
        raise UserError(f"there is no finished run in {where}; start with: python train.py --model lenet")
    groups = fold(finished)
    if groups:
        print_table(groups)
    if left_out := len(runs) - len(finished):
        print(f"{left_out} unfinished run{'s' if left_out > 1 else ''} left out")
    if older := len(finished) - sum(len(group.runs) for group in groups):
        print(f"{older} older run{'s' if older > 1 else ''} of the same seed left out")
    if request.output and groups:
        write_report(groups, request.output)
        print(f"Wrote {plain(str(request.output / 'report.md'))}")
    for failure in failed:
        print_error("compare.py", failure)
    return 1 if failed else 0
