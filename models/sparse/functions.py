"""What each function does to a sparse map: every one that is known, and a refusal by name of the others.

* *Local* functions (activations, sums, concatenation, 1x1 convolutions, a linear layer over channels) look at one site
  alone and run as they are.
* Functions that look at *neighbours* (convolutions, pooling, resizing) or at the *whole image* (global pooling, the
  statistics of a norm, a random number per image) go to the :class:`~models.sparse.geometry.Geometry`, the
  backend that knows where the visible sites are.
* Everything else is refused: never a silently wrong feature.

Shapes as in models/sparse/tensor.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from models.sparse.recompute import Again, relu_again, worth_it
from models.sparse.tensor import (
    Pad,
    Sites,
    SparseError,
    SparseTensor,
    Window,
    image_values,
    known,
    map_values,
    nchw,
    plain,
    wrap,
)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOCAL_UNARY_ZERO = _names(
    """relu relu6 silu gelu hardswish leaky_relu elu selu tanh mish prelu softsign tanhshrink abs neg square sqrt
    clone contiguous detach to float double half bfloat16 type type_as cpu cuda requires_grad alias dropout
    nan_to_num sin hardshrink softshrink celu"""
)
"""Functions of one site alone that leave zeros where they are."""
_LOCAL_LINEAR_ZERO = _names("""add sub iadd isub radd rsub cat concat stack where""")
"""Of several maps, all zero where hidden, they are too."""
_LOCAL_PRODUCT = _names("""mul imul rmul multiply""")
_LOCAL_QUOTIENT = _names("""div truediv itruediv""")
"""Zero where the maps are; of a quotient the first, as long as nothing is divided by a map."""
_LOCAL_ANY = _names(
    """sigmoid hardsigmoid logsigmoid hardtanh softplus exp log log1p expm1 pow rpow ipow rsqrt reciprocal rtruediv
    clamp clip clamp_min clamp_max maximum minimum lerp addcmul addcdiv erf cos threshold atan
    erfinv sign fill zero copy eq ne lt le gt ge isnan isinf isfinite logical_not
    logical_and logical_or masked_fill alpha_dropout is_same_size bitwise_not
    invert"""
)
_SHAPED = _names(
    """view reshape flatten unflatten transpose swapaxes swapdims movedim moveaxis squeeze unsqueeze expand
    expand_as view_as reshape_as chunk split split_with_sizes tensor_split unbind getitem narrow select
    index_select permute rearrange"""
)
_TURNS = _names("transpose swapaxes swapdims movedim moveaxis index_select")
"""Of these, views that may turn a map over: not a map until its shape is said again."""
_REDUCTIONS = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "var": 1, "std": 1, "norm": 2, "linalg_vector_norm": 2}
"""Reductions, and where their ``dim`` stands among the arguments."""
_IN_PLACE = _names("iadd isub imul itruediv ipow")
_QUESTIONS = _names(
    """size dim stride numel nelement element_size is_floating_point is_complex is_contiguous data_ptr get_device
    storage_offset untyped_storage ndimension is_nonzero len repr str format hash requires_grad_ register_hook
    backward retain_grad item tolist has_names is_inference numpy reduce_ex"""
)
"""What is asked of a tensor, without making one."""


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func(*args, **kwargs)``, of which at least one is a sparse tensor.

    Raises:
        SparseError: nothing is known of the function, or not with these arguments.
    """
    name = func.__name__.strip("_")
    if name in ("get", "set"):  # attributes, such as x.shape
        return _attribute(func, args, kwargs)
    if name in _QUESTIONS:
        return func(*args, **kwargs)
    found = [value for value in _tensors((*args, *kwargs.values())) if isinstance(value, SparseTensor)]
    maps = [value for value in found if value.sites.kind != "image"]
    first = (maps or found)[0]
    sites = first.sites
    if any(value.sites.geometry is not sites.geometry for value in found):
        raise SparseError(f"{name} of features of two masks: features of one call only can be put together")
    for value in found:
        known(value)
    sites = first.sites
    if name not in ("conv2d", "max_pool2d", "avg_pool2d") and any(value.sites.pad for value in maps):
        raise SparseError(f"{name} of a padded map: only a convolution or pooling may follow the padding")
    if name in _HANDLERS:
        return _HANDLERS[name](func, args, kwargs)
    if not maps:
        return _of_images(name, func, args, kwargs, sites)
    if name in _REDUCTIONS:
        return _reduce(name, func, args, kwargs)
    if name in _SHAPED:
        return _shaped(name, func, args, kwargs, first)
    if name in _LOCAL_UNARY_ZERO or name in _LOCAL_PRODUCT:
        clean = all(value.sites.clean for value in maps)
    elif name in _LOCAL_QUOTIENT:
        clean = len(maps) == 1 and maps[0] is args[0] and maps[0].sites.clean
    elif name in _LOCAL_LINEAR_ZERO:
        others = [value for value in _tensors((*args, *kwargs.values())) if not any(value is m for m in maps)]
        scalars = any(isinstance(value, (int, float)) and value for value in (*args[:2], kwargs.get("other")))
        clean = all(value.sites.clean for value in maps) and not others and not scalars
    elif name in _LOCAL_ANY:
        clean = False
    else:
        raise SparseError(
            f"{_title(func)} is not known to look at one site alone: it may see hidden or miss visible ones"
        )
    _refuse_plain_rows(name, args, kwargs, sites)
    if name == "relu" and first.again and worth_it():
        result, again = relu_again(first.again, lambda: func(*args, **kwargs))
        out = wrap(result, sites)
        out.again = again
        return out
    result = func(*args, **kwargs)
    return _each(result, lambda out: _checked(name, out, dataclasses.replace(sites, clean=clean)))


def _title(func: Callable[..., Any]) -> str:
    module = (
        getattr(func, "__module__", None) or getattr(getattr(func, "__objclass__", None), "__name__", None) or "torch"
    )
    return f"{module}.{func.__name__}"


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, one level into lists."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def _each(result: Any, change: Callable[[Tensor], Any]) -> Any:
    """``change`` of every tensor of a result."""
    if isinstance(result, Tensor):
        return change(result)
    if isinstance(result, (list, tuple)):
        changed = [_each(item, change) for item in result]
        return type(result)(*changed) if hasattr(result, "_fields") else type(result)(changed)
    return result


def _attribute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    result = func(*args, **kwargs)
    if isinstance(result, Tensor) and not isinstance(result, SparseTensor):
        if (
            getattr(getattr(func, "__self__", None), "__name__", "") in ("T", "mT", "H", "mH")
            or result.shape != args[0].shape
        ):
            raise SparseError("transposing a map by attribute is not supported: use permute")
        return wrap(result, args[0].sites)
    return result


def _refuse_plain_rows(name: str, args: Any, kwargs: Any, sites: Sites) -> None:
    """A plain tensor with a row per tile was made by something that does not know of tiles, such as a random number each."""
    rows, values = sites.geometry.rows_of_batch, _tensors((*args, *kwargs.values()))
    axes = max(value.dim() for value in values)
    for value in values:
        if not isinstance(value, SparseTensor) and value.dim() == axes and value.shape[0] == rows > 1:
            raise SparseError(
                f"{name} with a plain tensor of shape {tuple(value.shape)}, which knows nothing of the mask"
            )


def _checked(name: str, out: Tensor, sites: Sites) -> SparseTensor:
    """The result of a local function: still a map of the same sites."""
    shape, side = tuple(out.shape), sites.side
    same = {"nchw": lambda: shape[2:] == side, "nhwc": lambda: shape[1:3] == side}.get(sites.kind, lambda: True)
    if not shape or shape[0] != sites.geometry.rows_of_batch or (len(shape) == 4 and not same()):
        raise SparseError(f"{name} makes a tensor of {shape} of a map with tiles of {side}: it looks beyond a site")
    return wrap(out, sites if len(shape) == 4 else dataclasses.replace(sites, kind="other"))


def _of_images(name: str, func: Callable[..., Any], args: Any, kwargs: Any, sites: Sites) -> Any:
    """Functions of pooled values alone run on one row per image; views keep the rows that shapes speak of."""
    geometry = sites.geometry
    if name in _SHAPED:

        def same(out: Tensor) -> SparseTensor:
            if out.dim() == 0 or out.shape[0] != geometry.rows_of_batch:
                raise SparseError(f"{name} of pooled values makes a tensor of {tuple(out.shape)}: it mixes images")
            return wrap(out, sites)

        return _each(func(*args, **kwargs), same)

    def single(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(single(item) for item in value)
        return geometry.images(plain(value)).clone() if isinstance(value, SparseTensor) else value

    result = func(*single(args), **{key: single(value) for key, value in kwargs.items()})
    if (func.__name__.endswith("_") and not func.__name__.endswith("__")) or name in _IN_PLACE or kwargs.get("inplace"):
        return wrap(args[0].copy_(geometry.spread(result)), sites)

    def change(out: Tensor) -> SparseTensor:
        if out.dim() == 0 or out.shape[0] != geometry.batch:
            raise SparseError(f"{name} of pooled values makes a tensor of {tuple(out.shape)}: it mixes images")
        return image_values(out, sites)

    return _each(result, change)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _shaped(name: str, func: Callable[..., Any], args: Any, kwargs: Any, x: SparseTensor) -> Any:
    """Views: the same values in another order of axes. A 4-axis view with the map's sides is a map again."""
    sites, rows = x.sites, x.sites.geometry.rows_of_batch
    _refuse_plain_rows(name, args, kwargs, sites)
    result = func(*args, **kwargs)
    if args[0] is not x:  # something made as large as the map
        sites = dataclasses.replace(sites, clean=False)

    def change(out: Tensor) -> SparseTensor:
        shape = tuple(out.shape)
        if not shape or shape[0] != rows:
            raise SparseError(f"{name} makes a tensor of {shape} of {tuple(x.shape)}: the first axis holds the tiles")
        kinds = []
        if len(shape) == 4:
            kinds = [kind for kind, inner in (("nchw", shape[2:]), ("nhwc", shape[1:3])) if inner == sites.side]
            factor = [a // b for a, b in zip(sites.side, shape[2:], strict=True)]
            if (
                sites.kind == "other"
                and not kinds
                and all(f * b == a for f, a, b in zip(factor, sites.side, shape[2:], strict=True))
            ):
                # Sites of a tile that became channels, as in a stem from space to depth.
                return wrap(out, dataclasses.replace(sites, kind="nchw", side=(shape[2], shape[3])))
        kind = sites.kind if sites.kind in kinds else (kinds or ["other"])[0]
        picked = name == "getitem" and any(isinstance(i, (Tensor, list)) for i in _as_tuple(args[1]))
        if (name in _TURNS or picked) and x.dim() == 4:
            kind = "other"
        if name == "permute" and x.dim() == 4 and kinds:
            order = [d % 4 for d in (args[1] if isinstance(args[1], (tuple, list)) else args[1:])]
            if sites.kind == "nchw" and order == [0, 2, 3, 1]:
                kind = "nhwc"
            elif sites.kind == "nhwc" and order == [0, 3, 1, 2]:
                kind = "nchw"
            elif order != [0, 1, 2, 3] and sites.kind != "other":
                kind = "other"
        return wrap(out, dataclasses.replace(sites, kind=kind))

    return _each(result, change)


# --- whole images ---------------------------------------------------------------------------------------------------


def _take(name: str, position: int, args: tuple[Any, ...], kwargs: dict[str, Any], default: Any = None) -> Any:
    return kwargs.get(name, args[position] if len(args) > position else default)


def _reduce(name: str, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A mean, sum, norm ... over channels is local; over all sites it runs over the image's visible ones."""
    x: SparseTensor = args[0]
    sites, position = x.sites, _REDUCTIONS[name]
    dim = _take("dim", position, args, kwargs)
    if isinstance(dim, bool):
        raise SparseError(f"{name} of a whole map of {tuple(x.shape)} mixes images: say dim=")
    if name in ("var", "std") and len(args) > 2:  # x.var(dim, unbiased, keepdim)
        kwargs, args = {"unbiased": args[2], **({"keepdim": args[3]} if len(args) > 3 else {}), **kwargs}, args[:2]
    dims = [d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or [])]
    spatial = {"nchw": {2, 3}, "nhwc": {1, 2}}.get(sites.kind)
    if sites.kind == "other" and x.dim() > 3 and tuple(x.shape[-2:]) == sites.side:
        spatial = {x.dim() - 2, x.dim() - 1}  # channels in groups, or several maps stacked
        if spatial & set(dims):
            raise SparseError(f"{name} over the sites of a view of {tuple(x.shape)}: reduce the map itself")
    if not dims or 0 in dims or spatial is None or (spatial & set(dims) and spatial != set(dims)):
        raise SparseError(
            f"{name} over the axes {dim} of a map of {tuple(x.shape)}: over channels or over all sites only"
        )
    if not spatial & set(dims):
        out = func(*args, **kwargs)
        kind = sites.kind if out.dim() == 4 else "other"
        if sites.kind == "other" and out.dim() == 4:
            kind = "nchw"
        return wrap(out, dataclasses.replace(sites, kind=kind, clean=False))
    keep = {"nchw": (slice(None), slice(None), None, None), "nhwc": (slice(None), None, None)}[sites.kind]
    keepdim = bool(_take("keepdim", position + 1, args, kwargs, False))
    rest = {key: value for key, value in kwargs.items() if key not in ("dim", "keepdim")}
    rows = sites.geometry.rows(nchw(x), sites)  # (B, sites, C)
    pooled = func(rows, *args[1:position], dim=1, **rest)
    return image_values(pooled[keep] if keepdim else pooled, sites)


def _along(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A function along one axis, such as softmax: local along the channels."""
    x: SparseTensor = args[0]
    position, default = {"normalize": (2, 1), "glu": (1, -1)}.get(func.__name__, (1, None))
    dim = _take("dim", position, args, kwargs, default)
    if x.sites.kind == "image":
        return _of_images(func.__name__, func, args, kwargs, x.sites)
    channels = {"nchw": 1, "nhwc": 3}.get(x.sites.kind)
    if channels is None or not isinstance(dim, int) or dim % 4 != channels:
        raise SparseError(f"{_title(func)} along the axis {dim} of a map of {tuple(x.shape)} is not along its channels")
    return _checked(func.__name__, func(*args, **kwargs), dataclasses.replace(x.sites, clean=False))


def _channels_first(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Functions that take the second axis for the channels."""
    x: SparseTensor = args[0]
    if x.sites.kind == "image":
        return _of_images(func.__name__, func, args, kwargs, x.sites)
    _refuse_views(func.__name__, x)
    return _checked(func.__name__, func(*args, **kwargs), dataclasses.replace(x.sites, clean=False))


def _adaptive_pool(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x: SparseTensor = args[0]
    size = _take("output_size", 1, args, kwargs)
    if x.sites.kind == "image":
        return _of_images("adaptive_pool", func, args, kwargs, x.sites)
    if size not in (1, (1, 1), [1, 1]) or x.sites.kind != "nchw":
        raise SparseError(f"{_title(func)} to {size} is not local: pooling to one value per image is")
    reduce = Tensor.amax if "max" in func.__name__ else Tensor.mean
    return _reduce(reduce.__name__, reduce, (x, (2, 3), True), {})


def _norm_args(args: Any, kwargs: Any) -> tuple[SparseTensor, Any, Any]:
    x = args[0] if args else kwargs["input"]
    return x, args[1:] if args else (), {key: value for key, value in kwargs.items() if key != "input"}


_BATCH_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
"""Arguments of torch.nn.functional.batch_norm after its input."""


def _batch_norm(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Statistics over the visible sites of the whole batch.

    ``func`` is torch's function, or one of that name whose statistics are those of several processes; which has
    ``remembering``, see :func:`_remembering`.
    """
    x, rest, named = _norm_args(args, kwargs)
    sites = x.sites
    if sites.kind == "image":
        return image_values(func(sites.geometry.images(plain(x)), *rest, **named), sites)
    _refuse_views("batch_norm", x)
    values, given = plain(x), dict(zip(_BATCH_NORM, rest, strict=False)) | named
    # torch.batch_norm, too, comes by this name, with its arguments in another order
    remembering = getattr(func, "remembering", _remembering if func is F.batch_norm else None)
    if not (remembering and given.get("training") and sites.geometry.recomputes and worth_it()):
        out = sites.geometry.batch_norm(values, sites, lambda v: func(v, *rest, **named))
        return map_values(out, sites, clean=True)
    makers: list[Callable[[Tensor], Tensor]] = []

    def norm(rows: Tensor) -> Tensor:
        result, again = remembering(rows, **given)
        makers.append(again)
        return result

    out = map_values(sites.geometry.batch_norm(values, sites, norm), sites, clean=True)
    sources = [values, *(v.detach() for v in (given.get("weight"), given.get("bias")) if v is not None)]
    out.again = Again(lambda: sites.geometry.batch_norm(values, sites, makers[0]), sources, plain(out))
    return out


def _remembering(rows: Tensor, **given: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Batch norm in training, and a function that makes the same of the same rows again and changes nothing else."""
    # What is behind a weight now: ZeRO-3 takes it away from the parameter itself until that is needed.
    held = {name: v.detach() for name in ("weight", "bias") if (v := given.get(name)) is not None}
    again = functools.partial(F.batch_norm, **given | held | {"running_mean": None, "running_var": None})
    return F.batch_norm(rows, **given), again


def _image_norm(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Group and instance norm: statistics over the visible sites of one image."""
    x, rest, named = _norm_args(args, kwargs)
    sites = x.sites
    if sites.kind == "image":
        return _of_images(func.__name__, func, args, kwargs, sites)
    _refuse_views(func.__name__, x)
    rows = sites.geometry.rows(nchw(x), sites)
    out = func(rows.transpose(1, 2), *rest, **named).transpose(1, 2)
    return map_values(sites.geometry.from_rows(out, sites), sites, clean=True)


def _layer_norm(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x: SparseTensor = args[0]
    shape = _take("normalized_shape", 1, args, kwargs)
    if x.sites.kind == "image":
        return _of_images(func.__name__, func, args, kwargs, x.sites)
    if x.sites.kind == "nchw" or len(shape) != 1:
        raise SparseError(
            f"layer_norm over {tuple(shape)} of a map of {tuple(x.shape)} reaches beyond the channels of a site"
        )
    return _checked(func.__name__, func(*args, **kwargs), dataclasses.replace(x.sites, clean=False))


def _linear(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x: SparseTensor = args[0]
    if x.sites.kind == "image":
        out = func(x.sites.geometry.images(plain(x)), *args[1:], **kwargs)
        return image_values(out, x.sites)
    if x.sites.kind == "nchw":
        raise SparseError(f"linear on the last axis of a map of {tuple(x.shape)} mixes its columns")
    out = func(plain(x), *args[1:], **kwargs)
    return wrap(out, dataclasses.replace(x.sites, clean=False))


def _random(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Random numbers: one per image where the value is pooled (stochastic depth), refused on maps."""
    x: SparseTensor = args[0]
    if x.sites.kind != "image":
        raise SparseError(f"{_title(func)} on a map draws other numbers for tiles than for the dense map")
    drawn = func(x.sites.geometry.images(plain(x)).clone(), *args[1:], **kwargs)
    x.copy_(x.sites.geometry.spread(drawn)) if func.__name__.endswith("_") else None
    return x if func.__name__.endswith("_") else image_values(drawn, x.sites)


def _channel_dropout(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Whole channels, the same in all tiles of an image."""
    x, rest, named = _norm_args(args, kwargs)
    if x.sites.kind == "image":
        return image_values(func(x.sites.geometry.images(plain(x)), *rest, **named), x.sites)
    keep = func(plain(x).new_ones(x.sites.geometry.batch, x.shape[1], 1, 1), *rest, **named)
    return wrap(plain(x) * x.sites.geometry.spread(keep), x.sites)


def _new(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """``x.new_empty(shape)`` and the like: with a row per tile and one value each it is one value per image."""
    x: SparseTensor = args[0]
    made = func(*args, **kwargs)
    if made.dim() and made.shape[0] == x.sites.geometry.rows_of_batch:
        if made.numel() == made.shape[0]:
            return wrap(made, dataclasses.replace(x.sites, kind="image", clean=True, pad=None))
        if made.shape == x.shape:
            return wrap(made, dataclasses.replace(x.sites, clean=False))
        raise SparseError(f"{_title(func)} of shape {tuple(made.shape)} has rows per tile that nothing is known about")
    return plain(made)


# --- neighbours -----------------------------------------------------------------------------------------------------


def _refuse_views(name: str, x: SparseTensor) -> None:
    if x.sites.kind != "nchw":
        raise SparseError(
            f"{name} on a {'channels-last map' if x.sites.kind == 'nhwc' else 'view'} of shape {tuple(x.shape)}"
        )


def _pad(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    x: SparseTensor = args[0]
    amounts = tuple(_take("pad", 1, args, kwargs))
    if x.sites.kind == "image":
        return _of_images("pad", func, args, kwargs, x.sites)
    if not any(amounts[:4]) and x.sites.kind == "nchw":
        return _checked("pad", func(*args, **kwargs), dataclasses.replace(x.sites, clean=False))
    if len(amounts) > 4 and any(amounts[4:]):
        raise SparseError(f"padding of {amounts}: of rows and columns, or of channels, not of both")
    _refuse_views("pad", x)
    if x.sites.pad:
        raise SparseError("padding twice: add the amounts up")
    left, right, top, bottom = (*amounts, 0, 0)[:4]
    pad = Pad(
        (left, right, top, bottom), _take("mode", 2, args, kwargs, "constant"), _take("value", 3, args, kwargs) or 0.0
    )
    return wrap(plain(x).view_as(x), dataclasses.replace(x.sites, pad=pad))


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns of a setting that is one number for both or two."""
    if isinstance(value, (tuple, list)):
        return (int(value[0]), int(value[-1]))
    return (int(value), int(value))


def _conv2d(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(x, SparseTensor):
        raise SparseError("a convolution whose kernel is a feature map is not supported")
    if x.sites.kind == "image":
        out = func(x.sites.geometry.images(plain(x)), *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
        return image_values(out, x.sites)
    _refuse_views("conv2d", x)
    stride, dilation = pair(given.get("stride", 1)), pair(given.get("dilation", 1))
    kernel = (weight.shape[2], weight.shape[3])
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        amounts = (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
    else:
        rows, columns = pair(padding)
        amounts = (columns, columns, rows, rows)
    pad = _merged(x.sites.pad, amounts, "conv2d", 0.0)
    with x.again.keeping() if x.again and worth_it() else nullcontext():
        out = x.sites.geometry.conv2d(
            plain(x), x.sites, weight, bias, stride=stride, pad=pad, dilation=dilation, groups=given.get("groups", 1)
        )
    return map_values(out, x.sites, clean=True)


def _merged(pending: Pad | None, amounts: tuple[int, int, int, int], name: str, value: float) -> Pad:
    """The padding of a function together with that asked for before it."""
    if pending is None:
        return Pad(amounts, value=value)
    if any(amounts):
        raise SparseError(f"{name} pads a map that is padded already: add the amounts up")
    return pending


def _conv_transpose2d(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, args, strict=False)) | kwargs
    x, weight = given.pop("input"), given["weight"]
    _refuse_views("conv_transpose2d", x)
    stride, kernel = pair(given.get("stride", 1)), (weight.shape[2], weight.shape[3])
    still = not any((*pair(given.get("padding", 0)), *pair(given.get("output_padding", 0))))
    local = kernel == stride and still and pair(given.get("dilation", 1)) == (1, 1)
    return _neighbours(functools.partial(func, **given), x, stride, up=True, local=local)


def _pool(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Max pooling ignores hidden sites; average pooling counts them as zeros and divides as it does without a mask."""
    largest = "max" in func.__name__
    names = ("input", "kernel_size", "stride", "padding") + (
        ("dilation", "ceil_mode", "return_indices")
        if largest
        else ("ceil_mode", "count_include_pad", "divisor_override")
    )
    given = dict(zip(names, args, strict=False)) | kwargs
    x = given.pop("input")
    if x.sites.kind == "image":
        return _of_images(func.__name__, func, args, kwargs, x.sites)
    _refuse_views(func.__name__, x)
    if given.get("return_indices"):
        raise SparseError("max pooling that returns indices is not supported: they would point into tiles")
    kernel = pair(given["kernel_size"])
    given_stride = given.get("stride")
    stride = kernel if given_stride in (None, [], ()) else pair(given_stride)
    local = kernel == stride and not any(pair(given.get("padding", 0))) and pair(given.get("dilation", 1)) == (1, 1)
    fill = float("-inf") if largest else 0.0
    window = None
    if largest or (
        given.get("count_include_pad", True) and not given.get("ceil_mode") and not given.get("divisor_override")
    ):
        rows, columns = pair(given.get("padding", 0))
        more = (stride[0] - 1, stride[1] - 1) if given.get("ceil_mode") else (0, 0)  # a last, incomplete window
        dilation = pair(given.get("dilation", 1))
        bare = {"kernel_size": kernel, "stride": stride} | ({"dilation": dilation} if largest else {})
        window = Window(
            kernel, Pad((columns, columns + more[1], rows, rows + more[0])), dilation, lambda v: func(v, **bare)
        )
    local = local and x.sites.pad is None
    return _neighbours(functools.partial(func, **given), x, stride, fill=fill, local=local, window=window)


def _interpolate(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given = dict(zip(names, args, strict=False)) | kwargs
    x: SparseTensor = given.pop("input")
    if x.sites.kind == "image":
        return _of_images("interpolate", func, args, kwargs, x.sites)
    _refuse_views("interpolate", x)
    size, scale = given.pop("size", None), given.pop("scale_factor", None)
    side = x.sites.side
    factor = (
        tuple(s / b for s, b in zip(pair(size), side, strict=True))
        if size is not None
        else (tuple(float(s) for s in scale) if isinstance(scale, (tuple, list)) else (float(scale), float(scale)))
    )
    if any(f < 1 or f != int(f) for f in factor):
        raise SparseError(f"resizing a map {factor} times: only whole multiples keep the tiles apart")
    stride = (int(factor[0]), int(factor[1]))
    given["scale_factor"] = (float(stride[0]), float(stride[1]))
    local = given.get("mode", "nearest") == "nearest"
    return _neighbours(functools.partial(func, **given), x, stride, up=True, local=local)


def _neighbours(
    function: Callable[[Tensor], Tensor],
    x: SparseTensor,
    stride: tuple[int, int],
    *,
    fill: float = 0.0,
    up: bool = False,
    local: bool = False,
    window: Window | None = None,
) -> SparseTensor:
    """``function`` of the dense map with ``fill`` at hidden sites; where it is local it runs on the sites there are."""
    sites, geometry = x.sites, x.sites.geometry
    side = geometry.scaled(sites.side, stride, up=up)
    out = geometry.neighbours(function, plain(x), sites, side, fill=fill, local=local, stride=stride, window=window)
    return map_values(out, sites, clean=True)


def _pixel_shuffle(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Channels to sites of the same tile: local. (The other way needs tiles that the factor divides.)"""
    x: SparseTensor = args[0]
    _refuse_views(func.__name__, x)
    factor = pair(_take("upscale_factor" if "unshuffle" not in func.__name__ else "downscale_factor", 1, args, kwargs))
    x.sites.geometry.scaled(x.sites.side, factor, up="unshuffle" not in func.__name__)
    return map_values(func(plain(x), factor[0]), x.sites, clean=x.sites.clean)


_HANDLERS: dict[str, Callable[[Callable[..., Any], Any, Any], Any]] = {
    "conv2d": _conv2d,
    "conv_transpose2d": _conv_transpose2d,
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "adaptive_max_pool2d": _adaptive_pool,
    "interpolate": _interpolate,
    "upsample": _interpolate,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_shuffle,
    "pad": _pad,
    "batch_norm": _batch_norm,
    "group_norm": _image_norm,
    "instance_norm": _image_norm,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "linear": _linear,
    **dict.fromkeys(("local_response_norm", "channel_shuffle", "native_channel_shuffle"), _channels_first),
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "normalize", "glu"), _along),
    "bernoulli": _random,
    "uniform": _random,
    "normal": _random,
    "dropout2d": _channel_dropout,
    "feature_dropout": _channel_dropout,
    **dict.fromkeys(
        ("new_empty", "new_ones", "new_zeros", "new_full", "new_tensor", "ones_like", "zeros_like", "empty_like"), _new
    ),
}
"""Functions that are more than local, by name without underscores."""
