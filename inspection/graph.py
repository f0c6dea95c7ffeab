"""The network as a graph of its modules, for TensorBoard's Graphs tab.

(SummaryWriter.add_graph needs torch.jit.trace, which is deprecated, takes a second for LeNet and draws hundreds of
nodes that nobody asked for.)
"""

import re
from typing import Any

import torch
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from inspection.stages import evaluating, run_without_data, stage_modules


def network_graph(net: nn.Module, input_shape: tuple[int, int, int]) -> GraphDef:
    """The graph of one forward pass: a node for each module without children and each function between modules.

    Nothing is computed: the forward pass runs on tensors without data.

    Args:
        net: The network.
        input_shape: Shape (C, H, W) of one image.

    Raises:
        NotImplementedError: If the network needs data.
        Exception: Whatever else the network raises for an image of that shape.
    """
    images = torch.empty(1, *input_shape, device="meta")
    recorder = _Recorder(net, images)
    with evaluating(net), torch.no_grad(), recorder:
        # Not net(...): a compiled network would be compiled again.
        logits = run_without_data(_Forward(net), images)
    recorder.add("logits", "Output", [logits], logits)
    return GraphDef(node=recorder.nodes.values())


class _Forward(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Any:
        return self.net.forward(images)


class _Recorder(TorchDispatchMode):
    """Notes which node made each tensor."""

    def __init__(self, net: nn.Module, images: Tensor) -> None:
        super().__init__()
        self.nodes: dict[str, NodeDef] = {}
        self._modules = dict(net.named_modules())
        self._stages = tuple(stage_modules(net).values())
        self._tracker = ModuleTracker()
        self._kept: list[Any] = []  # so that no tensor's id is used again
        self._made_by: dict[int, str] = {}
        self.add("images", "Input", [], images)

    def __enter__(self) -> Any:
        self._tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._tracker.__exit__(*args)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        # What is computed from weights alone is part of a module, not of the flow.
        if any(id(value) in self._made_by for value in inputs):
            self._add_operation(func.overloadpacket.__name__, inputs, output)
        return output

    def add(self, name: str, kind: str, inputs: list[Tensor], output: Any, parameters: int = 0) -> None:
        """Add a node, or continue the last one of that name."""
        sources = dict.fromkeys(self._made_by[id(value)] for value in inputs if id(value) in self._made_by)
        node = self.nodes.setdefault(name, NodeDef(name=name, op=kind))
        node.input.extend(source for source in sources if source != name and source not in node.input)
        if parameters:
            node.attr["parameters"].i = parameters
        outputs = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        shapes = [[TensorShapeProto.Dim(size=size) for size in value.shape] for value in outputs[:1]]
        listed = AttrValue.ListValue(shape=[TensorShapeProto(dim=shape) for shape in shapes])
        node.attr["_output_shapes"].CopyFrom(AttrValue(list=listed))
        self._kept += outputs
        self._made_by |= {id(value): name for value in outputs}

    def _add_operation(self, function: str, inputs: list[Tensor], output: Any) -> None:
        path = max(self._tracker.parents, key=len).partition(".")[2]  # the innermost module, without the root's name
        path = path.removeprefix("net").removeprefix(".")
        scope = self._scope(path)
        module = self._modules.get(path)
        if path and module is not None and next(module.children(), None) is None:
            parameters = sum(parameter.numel() for parameter in module.parameters())
            if path in self._stages:
                # TensorBoard draws nodes with something inside larger and in colour, and cuts off long names.
                scope = f"{self._stages.index(path) + 1:02}_{type(module).__name__}/{path}"
            self.add(scope, type(module).__name__, inputs, output, parameters)
            return
        name = re.sub(r"^_|_$", "", function)
        name = f"{scope}/{name}" if scope else name
        count = sum(other.startswith(f"{name}_") for other in self.nodes)
        self.add(f"{name}_{count}", function, inputs, output)

    def _scope(self, path: str) -> str:
        """Name of a module's node: the stages are side by side, and opening one shows what is inside."""
        stage = next((name for name in self._stages if path == name or path.startswith(f"{name}.")), "")
        inner = path.removeprefix(stage).strip(".").split(".") if path != stage else []
        parts, so_far = [], ""
        for part in (stage, *inner) if stage else inner:
            so_far = f"{so_far}.{part}".strip(".")
            kind = type(self._modules.get(so_far)).__name__
            parts.append(part if kind in ("Sequential", "NoneType") else f"{part}_{kind}")
        return "/".join(parts)
