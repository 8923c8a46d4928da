"""``fuse`` runs each ``nn.Linear`` and the sigmoid after it as one operation; ``unfuse`` undoes it.

Such pairs are found in two places, and each has its own method:

* Neighbours in an ``nn.Sequential``. The linear layer becomes a :class:`neuron_ext.LinearSigmoid`
  and the sigmoid an ``nn.Identity``, so that the container keeps its length and its keys.
* A ``forward`` of the user's own, as in ``torch.sigmoid(self.fc1(x))``. The submodules stay what
  they are: other methods may call them, and expect a linear layer. Only ``forward`` is exchanged,
  for the code that torch.fx writes for its graph, with each pair as one call of
  :func:`_linear_sigmoid`. That function looks at the modules again whenever it runs, so that hooks
  or parametrizations added later aren't bypassed.

A graph records one run. It stands for all runs only where ``forward`` depends on nothing but its
arguments, submodules, parameters and buffers. Its bytecode must show that before it is traced,
which also keeps tracing free of side effects; see :func:`_forward_obstacle`. Bytecode and not
source, which a class typed into an interpreter hasn't got.
"""

from __future__ import annotations

import builtins
import copy
import dis
import functools
import inspect
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from neuron_ext import functional
from neuron_ext.nn import MLP, Linear, LinearSigmoid, Sigmoid

if TYPE_CHECKING:
    from torch import fx

__all__ = ["fuse", "unfuse"]

_log = logging.getLogger(__name__)

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_Classes = tuple[type[nn.Module], ...]
# What a fused forward is made of: its module's class, its source, and the globals of that source.
_Parts = tuple[type[nn.Module], str, tuple[tuple[str, Any], ...]]

_LINEARS: _Classes = (nn.Linear, Linear)
_SIGMOIDS: _Classes = (nn.Sigmoid, Sigmoid)
_SIGMOID_FUNCTIONS = (torch.sigmoid, nn.functional.sigmoid, torch.special.expit)
_LISTINGS = frozenset(("children", "get_submodule", "modules", "named_children", "named_modules"))


def fuse(module: _ModuleT) -> _ModuleT:
    """Runs each ``nn.Linear`` and the sigmoid after it as one operation, where that is safe.

    Fuses neighbours in an ``nn.Sequential`` at any depth, and, in modules whose ``forward``
    torch.fx can trace, a layer whose output goes to ``torch.sigmoid``, ``F.sigmoid``,
    ``.sigmoid()`` or an ``nn.Sigmoid`` and nowhere else. Outputs and gradients stay the same within
    rounding.

    Works in place. Parameter objects, the keys of the state_dict, training flags and hooks stay, so
    an optimizer made before goes on working. In a Sequential, a :class:`neuron_ext.LinearSigmoid`
    and an ``nn.Identity`` take the place of the pair. A module with a fused ``forward`` gets a
    subclass of its class, of the same name, and can be copied, pickled, compiled and exported; if
    its ``forward`` loops over submodules, unfuse and fuse it again after adding or removing some.
    Fusing twice changes nothing.

    What can't be proved safe is left as it is, with the reason in an INFO line of the logger
    ``neuron_ext.fusion``: a layer or sigmoid with hooks, parametrizations or a ``forward`` of its
    own; a layer that is in several places, or whose output is used elsewhere; an ``nn.Sequential``
    whose members the model looks up; a ``forward`` that uses other state, as ``self.training``.

    Returns:
        ``module`` itself.
    """
    looked_into = _looked_into(module)
    for path, child in module.named_modules():
        if _has_own_forward(child):
            looked_into |= _fuse_forward(path or type(child).__name__, child)
    _exchange_neighbours(module, (_LINEARS, _SIGMOIDS), (LinearSigmoid, nn.Identity), looked_into)
    return module


def unfuse(module: _ModuleT) -> _ModuleT:
    """Turns what :func:`fuse` made, and this package's modules, into plain torch modules.

    Works in place and keeps Parameter objects, keys, training flags and hooks.
    ``neuron_ext.Linear``, ``Sigmoid`` and ``MLP`` become ``nn.Linear``, ``nn.Sigmoid`` and
    ``nn.Sequential``. So do a :class:`neuron_ext.LinearSigmoid` and the ``nn.Identity`` after it in
    a Sequential. A LinearSigmoid that stands alone has no plain counterpart with the same keys: it
    stays, as does what got hooks or parametrizations since it was fused, and an INFO line of the
    logger ``neuron_ext.fusion`` says so.

    Returns:
        ``module`` itself.
    """
    plain: dict[type, type] = {Linear: nn.Linear, Sigmoid: nn.Sigmoid, MLP: nn.Sequential}
    for child in module.modules():
        cls = type(child)
        if _is_fused_class(cls):
            child.__class__ = cls._neuron_ext_parts[0]
        elif cls in plain:
            child.__class__ = plain[cls]
    _exchange_neighbours(
        module, ((LinearSigmoid,), (nn.Identity,)), (nn.Linear, nn.Sigmoid), _looked_into(module)
    )
    for path, child in module.named_modules():
        if isinstance(child, (LinearSigmoid, _FusedForward)):
            _log.info("%s stays a %s", path or "the module", type(child).__name__)
    return module


# ---- neighbours in a Sequential ------------------------------------------------------------------


def _exchange_neighbours(
    root: nn.Module,
    wanted: tuple[_Classes, _Classes],
    made: tuple[type[nn.Module], type[nn.Module]],
    looked_into: set[int],
) -> None:
    """Exchanges each pair of ``wanted`` classes in a Sequential for one of the classes ``made``."""
    places = Counter(id(child) for parent in root.modules() for child in parent._modules.values())
    for path, stack in list(root.named_modules()):
        if not isinstance(stack, nn.Sequential) or type(stack).forward is not nn.Sequential.forward:
            continue
        for i, (first, second) in enumerate(itertools.pairwise(list(stack))):
            if not (isinstance(first, wanted[0]) and isinstance(second, wanted[1])):
                continue
            obstacle = _exchange_obstacle(first, wanted[0]) or _exchange_obstacle(second, wanted[1])
            if places[id(first)] > 1:
                obstacle = "the layer is in several places"
            elif id(stack) in looked_into:
                obstacle = "the model looks up members of this Sequential"
            if obstacle is not None:
                _log.info("%s[%d] left as it is: %s", path, i, obstacle)
                continue
            stack[i] = _converted(first, made[0])
            stack[i + 1] = _converted(second, made[1])


def _exchange_obstacle(module: nn.Module, classes: _Classes) -> str | None:
    """Why ``module`` can't be exchanged for another object; None if it can."""
    if (
        module._state_dict_hooks
        or module._state_dict_pre_hooks
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    ):
        return f"{type(module).__name__} has state_dict hooks"  # which may be tied to the object
    return _call_obstacle(module, classes)


def _call_obstacle(module: nn.Module, classes: _Classes) -> str | None:
    """Why a call of ``module`` may do more than the forward of ``classes``; None if it doesn't."""
    if type(module) not in classes:
        return f"{type(module).__name__} may have a forward or parameters of its own"
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    ):
        return f"{type(module).__name__} has hooks"
    if "forward" in module.__dict__:
        return f"the forward of {type(module).__name__} was replaced"
    return None


def _converted(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A ``cls`` with the very parameters, flags and attributes of ``module``, which stays."""
    twin = cls.__new__(cls)
    for name, value in vars(module).items():
        vars(twin)[name] = copy.copy(value) if isinstance(value, dict) else value
    return twin


def _looked_into(root: nn.Module) -> set[int]:
    """Ids of the modules that a method of the user's may do other things with than call them.

    So it may after ``self.net[0](x)`` or ``for layer in self.net``, also with what is below (as in
    ``self.net[0][1](x)``), but not after ``self.net(x)`` or ``self.net.parameters()``. What
    ``__init__`` does is over by now. A ``forward`` that lists modules, as with ``self.modules()``,
    may call any below its own; other methods that do so are for initialising.
    """
    names: set[str] = set()
    listed: set[int] = set()
    for cls in {cls for module in root.modules() for cls in type(module).__mro__}:
        if not issubclass(cls, nn.Module) or _is_library(cls.__module__):
            continue
        for name, member in vars(cls).items():
            member = getattr(member, "fget", getattr(member, "__func__", member))
            function = inspect.unwrap(member) if callable(member) else None
            if isinstance(function, FunctionType) and name != "__init__":
                looked_into = set(_names_looked_into(function.__code__))
                names |= looked_into
                if name == "forward" and looked_into & _LISTINGS:
                    owners = (m for m in root.modules() if isinstance(m, cls))
                    listed.update(id(m) for owner in owners for m in owner.modules())
    return listed | {
        id(module)
        for parent in root.modules()
        for name, child in parent._modules.items()
        if name in names and child is not None
        for module in child.modules()
    }


def _names_looked_into(code: CodeType) -> Iterator[str]:
    """Names of attributes that are neither called nor used in a way that keeps members inside.

    Methods that list modules are among them.
    """
    for this, following in itertools.pairwise(dis.get_instructions(code)):
        if this.opname in ("LOAD_ATTR", "LOAD_METHOD") and this.argval in _LISTINGS:
            yield this.argval
        is_called = sys.version_info >= (3, 12) and (this.arg or 0) & 1  # a LOAD_METHOD before 3.12
        if this.opname != "LOAD_ATTR" or is_called:
            continue
        if (
            following.opname not in ("LOAD_ATTR", "LOAD_METHOD")
            or not hasattr(nn.Module, following.argval)
            or following.argval in _LISTINGS
        ):
            yield this.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_looked_into(constant)


# ---- a forward of the user's own -----------------------------------------------------------------


def _linear_sigmoid(
    input: Tensor, linear: nn.Module, sigmoid: Callable[[Tensor], Tensor] = torch.sigmoid
) -> Tensor:
    """``sigmoid(linear(input))``, in one operation unless something now stands in the way."""
    if _call_obstacle(linear, _LINEARS) is None and (
        not isinstance(sigmoid, nn.Module) or _call_obstacle(sigmoid, _SIGMOIDS) is None
    ):
        return functional.linear_sigmoid(input, linear.weight, linear.bias)  # type: ignore[arg-type]
    return sigmoid(linear(input))


class _FusedForward:
    """Mixed into the class of a module whose forward was exchanged."""

    _neuron_ext_parts: ClassVar[_Parts]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle looks classes up by name and can't find this one: it is made again from its parts.
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        if not _is_fused_class(type(self)):
            return reduced  # a subclass, which knows how it can be pickled
        parts = self._neuron_ext_parts
        return (_new_instance, (parts, _fingerprint(parts[0])), *reduced[2:])


@functools.cache
def _fused_class(parts: _Parts) -> type[nn.Module]:
    """A subclass of ``base``, of the same name, with the forward in ``source``."""
    base, source, names = parts
    scope: dict[str, Any] = {n: import_module(v) if isinstance(v, str) else v for n, v in names}
    exec(compile(source, f"<fused {base.__qualname__}>", "exec"), scope)
    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": functools.update_wrapper(scope["forward"], base.forward),
        "_neuron_ext_parts": parts,
    }
    metaclass: Callable[..., type[nn.Module]] = type(base)
    return metaclass(base.__name__, (_FusedForward, base), namespace)


def _is_fused_class(cls: type) -> TypeGuard[type[_FusedForward]]:
    """Whether :func:`_fused_class` made ``cls``; a subclass of such a class is somebody else's."""
    return "_neuron_ext_parts" in vars(cls)


def _new_instance(parts: _Parts, fingerprint: object) -> nn.Module:
    """An empty module, for unpickling: a plain one if its forward was edited in the meantime."""
    base = parts[0]
    cls = _fused_class(parts) if fingerprint == _fingerprint(base) else base
    return cls.__new__(cls)


def _fingerprint(base: type[nn.Module]) -> tuple[bytes, tuple[str, ...], str]:
    code: CodeType = base.forward.__code__
    return code.co_code, code.co_names, repr(code.co_consts)


def _fuse_forward(path: str, module: nn.Module) -> set[int]:
    """Exchanges the forward of ``module`` if it has pairs. Returns ids of modules it looks into."""
    looked_into = set()
    obstacle = _forward_obstacle(module)
    if obstacle is None:
        try:
            graph = _trace(module)
            calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
            looked_into = {id(module.get_submodule(c.rpartition(".")[0])) for c in calls}
            if _fuse_calls(path, module, graph):
                module.__class__ = _fused_class(_parts(type(module), graph))
        except Exception as error:  # tracing runs the user's code, which may raise anything
            obstacle = f"it can't be traced: {error}"
    if obstacle is not None and any(isinstance(m, nn.Linear) for m in list(module.modules())[1:]):
        _log.info("%s: forward left as it is: %s", path, obstacle)
    return looked_into


def _trace(module: nn.Module) -> fx.Graph:
    """The graph of one forward, in which every submodule is one call."""
    from torch import fx

    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    return Tracer().trace(module)


def _fuse_calls(path: str, module: nn.Module, graph: fx.Graph) -> bool:
    """Exchanges each pair in the graph for one call; whether there was any."""
    fused = False
    for node in list(graph.nodes):
        sigmoid = _submodule(module, node)
        is_sigmoid = (
            isinstance(sigmoid, _SIGMOIDS)
            or (node.op == "call_function" and node.target in _SIGMOID_FUNCTIONS)
            or (node.op == "call_method" and node.target == "sigmoid")
        )
        if not is_sigmoid or len(node.all_input_nodes) != 1:
            continue
        (layer,) = node.all_input_nodes
        linear = _submodule(module, layer)
        if not isinstance(linear, nn.Linear):
            continue
        obstacle = _call_obstacle(linear, _LINEARS)
        if sigmoid is not None:
            obstacle = obstacle or _call_obstacle(sigmoid, _SIGMOIDS)
        if len(layer.users) > 1:
            obstacle = "its output is used elsewhere"
        elif len(layer.args) != 1 or layer.kwargs or node.args != (layer,) or node.kwargs:
            obstacle = "it or its sigmoid is called with keyword arguments"
        if obstacle is not None:
            _log.info("%s: %s left as it is: %s", path, layer.target, obstacle)
            continue
        with graph.inserting_before(layer):
            callables = [graph.get_attr(n.target) for n in (layer, node) if n.op == "call_module"]
            pair = graph.call_function(_linear_sigmoid, (layer.args[0], *callables))
        node.replace_all_uses_with(pair)
        graph.erase_node(node)
        graph.erase_node(layer)
        fused = True
    return fused


def _submodule(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _parts(base: type[nn.Module], graph: fx.Graph) -> _Parts:
    for node in graph.nodes:
        node.type = None  # the forward gets its annotations from the original one
    code = graph.python_code("self")
    # Python modules can't be pickled; their names can.
    names = ((n, v.__name__ if isinstance(v, ModuleType) else v) for n, v in code.globals.items())
    return base, code.src, tuple(sorted((n, v) for n, v in names if n in code.src))


def _forward_obstacle(module: nn.Module) -> str | None:
    """Why a graph of ``module.forward`` may not stand for all its runs; None if it does.

    Every name in the bytecode must be one of these:

    * the name of a submodule, parameter or buffer, which a graph looks up whenever it runs;
    * a function of torch that takes tensors, or an attribute of tensors, which a graph records. Not
      among them are functions that make tensors or use global state, as ``torch.rand`` or
      ``torch.no_grad``;
    * a function of Python for loops over submodules.

    Other instructions must write nothing but local variables, and look at no object in a way that
    torch.fx doesn't see: whether it is None, which pattern it matches, what it raises.
    """
    cls = type(module)
    code: CodeType = cls.forward.__code__
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "its class has its own way of being pickled"
    if "forward" in vars(module):
        return "it was replaced"
    if parametrize.is_parametrized(module):
        return "its module is parametrized"  # by way of its class, too
    if code.co_kwonlyargcount:
        return "it has keyword-only arguments"  # which torch.fx makes positional
    if code.co_freevars or code.co_cellvars or any(isinstance(c, CodeType) for c in code.co_consts):
        return "it is decorated, calls super() or contains functions"

    members = {
        path.rpartition(".")[2]
        for named in (module.named_modules, module.named_parameters, module.named_buffers)
        for path, _ in named(remove_duplicate=False)
    }
    owners = [m for m in module.modules() if _has_own_forward(m)]
    for instruction in dis.get_instructions(code):
        kind, name = instruction.opname, instruction.argval
        if kind in ("LOAD_ATTR", "LOAD_METHOD"):
            if any(_has_plain_attribute(m, name) for m in owners):
                return f"it uses the attribute {name}, which may change"
            if name not in members and not _is_recorded_attribute(name):
                return f"it uses .{name}, which a graph doesn't record"
        elif kind == "LOAD_GLOBAL":
            value = cls.forward.__globals__.get(name, vars(builtins).get(name))
            if not _is_recorded(value) and id(value) not in _LOOP_FUNCTIONS:
                return f"it uses {name}, which a graph doesn't record"
        elif (
            instruction.opcode in dis.hasname
            or kind.startswith(("STORE_S", "DELETE_S", "INPLACE_", "MATCH_", "SETUP_"))
            or kind in ("IS_OP", "PUSH_EXC_INFO")
            or kind.endswith("_NONE")
            or (kind == "BINARY_OP" and instruction.argrepr.endswith("="))
        ):
            return f"it has an instruction, {kind}, that a graph doesn't record"
    return None


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the forward is a Python function, neither torch's nor of this package's modules."""
    forward = inspect.getattr_static(type(module), "forward", None)
    return (
        isinstance(forward, FunctionType)
        and not isinstance(module, _FusedForward)
        and not _is_library(forward.__module__)
    )


def _is_library(module_name: str) -> bool:
    return f"{module_name}.".startswith(("torch.", "neuron_ext.nn."))


def _has_plain_attribute(module: nn.Module, name: str) -> bool:
    return name in vars(module) or (hasattr(type(module), name) and not hasattr(nn.Module, name))


def _is_recorded_attribute(name: str) -> bool:
    return hasattr(Tensor, name) or any(
        _is_recorded(getattr(namespace, name, None))
        for namespace in (torch, nn.functional, torch.special)
    )


def _is_recorded(value: object) -> bool:
    """Whether ``value`` is a function that graphs record, or a dtype or Python module of torch."""
    if isinstance(value, ModuleType):
        return f"{value.__name__}.".startswith("torch.")
    return isinstance(value, torch.dtype) or id(value) in _recorded_functions()


@functools.cache
def _recorded_functions() -> frozenset[int]:
    by_namespace = torch.overrides.get_overridable_functions()
    return frozenset(map(id, itertools.chain.from_iterable(by_namespace.values())))


_LOOP_FUNCTIONS = frozenset(map(id, (enumerate, len, range, reversed, zip)))
