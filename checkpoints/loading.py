"""What LitClassifier and the data modules share: they load themselves from checkpoint files, which are not trusted."""

from typing import Any, TypeVar

from checkpoints.reading import check_hyper_parameters

Loaded = TypeVar("Loaded", bound="CheckedLoading")


class CheckedLoading:
    """Stands before Lightning's class among the bases, and looks at a file before Lightning does."""

    @classmethod
    def load_from_checkpoint(
        cls: type[Loaded], checkpoint_path: Any, *args: Any, trust_checkpoint: bool = False, **kwargs: Any
    ) -> Loaded:
        """Build the object anew from a checkpoint file, whose content is not trusted; arguments as for Lightning's.

        With `trust_checkpoint` the file may name classes from outside this project, torch and torchvision. Even then
        nothing is unpickled but tensors and plain values, whatever `weights_only` says.

        Raises:
            UserError: If it is not such a file, is damaged, or names a class from elsewhere.
        """
        path = check_hyper_parameters(checkpoint_path, trust_checkpoint)
        load = super().load_from_checkpoint  # type: ignore[misc]
        return load(path, *args, **kwargs | {"weights_only": True})
