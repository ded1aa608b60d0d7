"""An optimizer's state by parameter name: exact, in plain tensors and JSON, without pickle.

torch keys the state by a parameter's place in a list, which a model built in another order fills with another's
moments, and casts it to the parameter's dtype on the way in. Here a name decides, nothing is cast, and what does not
fit is said before anything is taken.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from reverie.base.errors import ModelFileError, UsageError
from reverie.models.checkpoints import Spec, check_tensors


def named_groups(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return an optimizer's parameters by name, group by group.

    Raises:
        UsageError: A parameter has no name.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise UsageError(f"the optimizer has a parameter {tuple(parameter.shape)} that the model has not")
        groups.append({names[id(parameter)]: parameter for parameter in group["params"]})
    return groups


def plain_option(value: Any) -> Any:
    """Return an optimizer's option as a JSON value; numbers keep all their bits."""
    if isinstance(value, Tensor):
        return value.item()
    return [plain_option(item) for item in value] if isinstance(value, tuple | list) else value


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group: learning rate, betas, weight decay."""
    return {key: plain_option(value) for key, value in group.items() if key not in ("params", "param_names")}


def flatten_optimizer(
    optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by parameter name, and the rest as JSON: exact, and without pickle.

    Arguments:
        optimizer: Any whose state is tensors and numbers for each parameter (SGD, Adam, AdamW).
        named_parameters: The model's, as `model.named_parameters()`.

    Returns:
        Tensors such as "conv_in.weight/exp_avg", and a record for `restore_optimizer`.

    Raises:
        UsageError: A parameter has no name, or the state is of another kind.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward(); optimizer.step()
        >>> tensors, record = flatten_optimizer(optimizer, model.named_parameters())
        >>> sorted(tensors), record["groups"][0]["parameters"]
        (['weight/exp_avg', 'weight/exp_avg_sq', 'weight/step'], {'weight': [1, 2]})
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    groups = named_groups(optimizer, named_parameters)
    for name, parameter in (pair for group in groups for pair in group.items()):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{key}"] = value.detach()
            elif value is None or isinstance(value, int | float):
                numbers[f"{name}/{key}"] = value
            else:
                kind = type(optimizer).__name__
                raise UsageError(f"{kind} keeps a {type(value).__name__} as {key}, which cannot be saved; use AdamW")
    record = {
        "class": type(optimizer).__name__,
        "groups": [
            {
                "parameters": {name: list(parameter.shape) for name, parameter in named.items()},
                "options": options(group),
            }
            for named, group in zip(groups, optimizer.param_groups, strict=True)
        ],
        "numbers": numbers,
        "tensors": list(tensors),
    }
    return tensors, record


def restore_optimizer(
    optimizer: Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    source: str = "the saved optimizer",
    keep: Collection[str] = (),
) -> list[str]:
    """Give an optimizer the state that `flatten_optimizer` returned, bit for bit.

    Arguments:
        optimizer: A new one, of the same class, with its parameters in the same groups.
        named_parameters: The model's.
        tensors: The saved tensors.
        record: What was saved beside them.
        source: Where they come from, for the error messages.
        keep: Options that stay as they are now, such as "lr"; all others become what they were.

    Returns:
        A sentence for each kept option that was another when saved.

    Raises:
        ModelFileError: Class, parameters, groups or tensors differ; nothing was taken.
        UsageError: A parameter has no name, or an option to keep does not exist.
    """
    groups = named_groups(optimizer, named_parameters)
    try:
        saved = [(group["parameters"], group["options"]) for group in record["groups"]]
        check_optimizer(optimizer, groups, tensors, record, source)
        state = restored_state(optimizer, groups, tensors, record["numbers"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{source}: it is not the state of an optimizer ({error!r})") from error
    known = {key for _, old in saved for key in old}.union(*map(options, optimizer.param_groups))
    if unknown := sorted(set(keep) - known):
        raise UsageError(
            f"{type(optimizer).__name__} has no option {unknown[0]!r} to keep (known: {', '.join(sorted(known))})"
        )

    optimizer.state.clear()
    optimizer.state.update(state)
    told: dict[str, None] = {}
    for group, (_, old) in zip(optimizer.param_groups, saved, strict=True):
        for key, value in old.items():
            now = plain_option(group.get(key))
            if key in keep and now != value:
                told[f"{key}: {value} when saved, {now} from here on"] = None
            elif key not in keep:
                set_option(group, key, value)
    return list(told)


def check_optimizer(
    optimizer: Optimizer,
    groups: list[dict[str, Tensor]],
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    source: str,
) -> None:
    """Compare class, parameters, their groups, and the tensors that there should be.

    Raises:
        ModelFileError: They differ.
    """
    kind = type(optimizer).__name__
    if record["class"] != kind:
        raise ModelFileError(
            f"{source}: it is the state of {record['class']}, not of {kind}; use the optimizer of then"
        )
    there = {name: tuple(shape) for group in record["groups"] for name, shape in group["parameters"].items()}
    here = {name: parameter for group in groups for name, parameter in group.items()}
    # Types are compared with the weights; here a shape is enough.
    specs = {name: Spec(shape, here[name].dtype if name in here else torch.float32) for name, shape in there.items()}
    check_tensors(here, specs, source)
    if [list(group) for group in groups] != [list(group["parameters"]) for group in record["groups"]]:
        raise ModelFileError(f"{source}: its parameters are grouped otherwise; group them as they were")
    nothing = Spec((), torch.float32)
    check_tensors({name: tensors.get(name, nothing) for name in record["tensors"]}, tensors, source)


def restored_state(
    optimizer: Optimizer, groups: list[dict[str, Tensor]], tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> dict[Tensor, dict[str, Any]]:
    """Return the state by parameter, each tensor on the device and with the strides of its parameter."""
    owners = {
        name: (parameter, group)
        for named, group in zip(groups, optimizer.param_groups, strict=True)
        for name, parameter in named.items()
    }
    state: dict[Tensor, dict[str, Any]] = {}
    for place, value in [*tensors.items(), *numbers.items()]:
        name, _, key = place.rpartition("/")
        parameter, group = owners[name]
        if not isinstance(value, Tensor):
            placed: Any = value
        elif key == "step" and not (group.get("capturable") or group.get("fused")):
            placed = value.to("cpu", copy=True)  # where torch counts, unless told otherwise
        elif value.shape == parameter.shape:
            placed = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        else:
            placed = value.to(parameter.device, copy=True)
        state.setdefault(parameter, {})[key] = placed
    return state


def set_option(group: dict[str, Any], key: str, value: Any) -> None:
    """Set an option in the type that it has: tensors are filled in place, as compiled steps hold on to them."""
    now = group.get(key)
    if isinstance(now, Tensor):
        now.fill_(value)
    else:
        group[key] = tuple(value) if isinstance(now, tuple) else value
