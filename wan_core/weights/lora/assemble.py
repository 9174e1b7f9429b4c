"""Puts the tensors of one layer in a LoRA file together into adapters, and refuses what cannot be one.

Every check looks at shapes and types only, so that a hostile file is refused before anything is read or allocated. The
only numbers that are read are alphas and declared shapes.
"""
import math
from collections.abc import Callable, Mapping

from torch import Tensor

from ..errors import LoadError
from ..tensor_file import TensorFile
from .adapters import Additive, Delta, DoRA, LoHa, LoKr, LowRank, Replacement
from .keys import Key, Target, target_of

# Six times the largest tensor of any Wan model (time_projection of 14B, 30720 x 5120): no adapter has more.
LARGEST = 2**30

# Beyond the width of every layer that is adapted; it bounds what is computed between the factors.
LARGEST_RANK = 2**14

_LORA = ("down", "up", "mid")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_FAMILIES = {"LoRA": _LORA, "LoKr": _LOKR, "LoHa": _LOHA, "a full difference": ("diff",), "a replacement": ("set",)}

_DAMAGED = "The file is damaged or incomplete: download it again."

Part = tuple[Target, Additive | DoRA | Replacement, tuple[str, ...]]


class Layer:
    """The tensors of one layer in a file, by role, and how to make adapters of them."""

    def __init__(self, file: TensorFile, module: str, keys: Mapping[str, str], scale: Callable[..., float]):
        """`keys`: role -> key. `scale(rank, own_alpha)`: the factor of an adapter, see `Scaling`."""
        self._label, self._module, self._keys, self._scale_of = file.path.name, module, keys, scale
        # Views of the mapped file: of them only the shapes are looked at here.
        self._tensors = {role: file[key] for role, key in keys.items()}

    def adapters(self) -> tuple[list[Part], list[str]]:
        """The adapters as (target, adapter, keys used), and the keys that are of no use by themselves.

        Raises LoadError that names the key and the problem.
        """
        parts: list[Part] = []
        families = [(name, roles) for name, roles in _FAMILIES.items() if any(role in self._keys for role in roles)]
        if len(families) > 1:
            raise self._error(next(role for role in families[1][1] if role in self._keys),
                              f"{self._module} has both {families[0][0]} and {families[1][0]}")
        for role in self._keys:
            self._check(role)
        if families:
            name, roles = families[0]
            parts.append(self._weight(name, roles))
        for role, target in (("bias_diff", Target(self._module, "bias")),
                             ("modulation_diff", target_of(self._module, "modulation"))):
            if role in self._keys:
                parts.append((target, Delta(self._tensors[role]), (self._keys[role],)))
        if "up_bias" in self._keys:
            parts.append(self._up_bias())
        used = {key for _, _, keys in parts for key in keys}
        return parts, [key for key in self._keys.values() if key not in used]

    def _weight(self, family: str, roles: tuple[str, ...]) -> Part:
        # A plain difference has no rank; trainers write its alpha for uniformity.
        used = [role for role in (*roles, "alpha", "magnitude", "reshape") if role in self._keys]
        build = {"LoRA": self._lora, "LoKr": self._lokr, "LoHa": self._loha,
                 "a full difference": lambda: Delta(self._tensors["diff"]),
                 "a replacement": lambda: Replacement(self._tensors["set"])}[family]
        adapter = build()
        if math.prod(adapter.shape) > LARGEST:
            raise self._error(used[0], f"it is for a weight of shape {list(adapter.shape)}, larger than any of Wan")
        if "reshape" in used:
            self._check_declared(adapter.shape)
        if "magnitude" in used:
            if family == "a replacement":
                raise self._error("magnitude", "a tensor that is replaced has no DoRA magnitudes")
            adapter = DoRA(adapter, self._tensors["magnitude"])
        return target_of(self._module, "weight"), adapter, tuple(self._keys[role] for role in used)

    def _lora(self) -> LowRank:
        self._require("down", "up")
        down, up = self._shape("down"), self._shape("up")
        if "mid" not in self._keys:
            self._agree("rank", "down", down[0], "up", up[1])
            inner = down
        else:
            mid = self._shape("mid", axes=3)
            self._agree("rank", "mid", mid[0], "up", up[1])
            self._agree("rank", "mid", mid[1], "down", down[0])
            inner = (mid[0], math.prod(down[1:]) * math.prod(mid[2:]))
        if math.prod(up[2:]) != 1:
            raise self._error("up", f"its shape {list(up)} should be [out, rank]")
        if math.prod(inner) > LARGEST:
            raise self._error("down", f"its shape {list(down)} is larger than any layer of Wan allows")
        return LowRank(self._tensors["down"], self._tensors["up"], self._tensors.get("mid"), self._scale(down[0]))

    def _lokr(self) -> LoKr:
        left, right = self._lokr_side("lokr_w1"), self._lokr_side("lokr_w2")
        core = None
        if "lokr_t2" in self._keys:
            if len(right) != 2:
                raise self._error("lokr_t2", "a core needs lokr_w2_a and lokr_w2_b")
            core = self._core("lokr_t2", *right)
        elif len(right) == 2:
            self._agree("rank", right[0], self._shape(right[0])[1], right[1], self._shape(right[1])[0])
        if len(left) == 2:
            self._agree("rank", left[0], self._shape(left[0])[1], left[1], self._shape(left[1])[0])
        if any(math.prod(self._shape(role)[2:]) != 1 for role in left):
            raise self._error(left[-1], "the left side of a Kronecker product is a matrix here")
        # Whole matrices have no rank and are not scaled; LyCORIS writes an alpha of no meaning for them.
        factored = right if len(right) == 2 else left
        scale = self._scale(self._shape(factored[1])[0]) if len(factored) == 2 else 1.0
        return LoKr(tuple(map(self._tensors.get, left)), tuple(map(self._tensors.get, right)), core, scale)

    def _lokr_side(self, whole: str) -> tuple[str, ...]:
        if whole in self._keys:
            if f"{whole}_a" in self._keys or f"{whole}_b" in self._keys:
                raise self._error(whole, f"the layer has {whole} both whole and as a product")
            return (whole,)
        self._require(f"{whole}_a", f"{whole}_b")
        return f"{whole}_a", f"{whole}_b"

    def _loha(self) -> LoHa:
        pairs = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
        self._require(*pairs[0], *pairs[1])
        cores = None
        if "hada_t1" in self._keys or "hada_t2" in self._keys:
            self._require("hada_t1", "hada_t2")
            cores = tuple(self._core(role, *pair) for role, pair in zip(("hada_t1", "hada_t2"), pairs, strict=True))
            kernels = [self._shape(role)[2:] for role in ("hada_t1", "hada_t2")]
            if kernels[0] != kernels[1]:
                raise self._error("hada_t2", f"its kernel {kernels[1]} differs from {kernels[0]} of hada_t1")
        else:
            for a, b in pairs:
                self._agree("rank", a, self._shape(a)[1], b, self._shape(b)[0])
        outer = 1 if cores else 0
        self._agree("size", "hada_w1_a", self._shape("hada_w1_a")[outer], "hada_w2_a",
                    self._shape("hada_w2_a")[outer])
        self._agree("size", "hada_w1_b", math.prod(self._shape("hada_w1_b")[1:]), "hada_w2_b",
                    math.prod(self._shape("hada_w2_b")[1:]))
        scale = self._scale(self._shape("hada_w1_b")[0])
        return LoHa(*(tuple(map(self._tensors.get, pair)) for pair in pairs), cores, scale)

    def _core(self, role: str, a: str, b: str) -> Tensor:
        core = self._shape(role, axes=3)
        self._agree("rank", role, core[0], a, self._shape(a)[0])
        self._agree("rank", role, core[1], b, self._shape(b)[0])
        return self._tensors[role]

    def _up_bias(self) -> Part:
        """PEFT's bias of the up-projection (lora_bias=True): added to the layer's bias, scaled as the weight."""
        if "down" not in self._keys:
            raise self._error("up_bias", "the bias of a LoRA whose factors are missing")
        if "bias_diff" in self._keys:
            raise self._error("up_bias", "the layer has a second change of its bias")
        return (Target(self._module, "bias"), Delta(self._tensors["up_bias"], self._scale(self._shape("down")[0])),
                (self._keys["up_bias"],))

    def _scale(self, rank: int) -> float:
        alpha = None
        if "alpha" in self._keys:
            alpha = float(self._tensors["alpha"].item())
            if not math.isfinite(alpha):
                raise self._error("alpha", f"alpha is {alpha}")
        return self._scale_of(rank, alpha)

    def _check(self, role: str) -> None:
        shape, dtype = tuple(self._tensors[role].shape), self._tensors[role].dtype
        if role == "alpha" and math.prod(shape) != 1:
            raise self._error(role, f"alpha has the shape {list(shape)}, where one number is due")
        if role not in ("alpha", "reshape") and not dtype.is_floating_point:
            raise self._error(role, f"its type {str(dtype).removeprefix('torch.')} is no floating-point type")
        if not math.prod(shape):
            raise self._error(role, f"its shape {list(shape)} is empty: an adapter of rank 0 or a layer of width 0")
        if math.prod(shape) > LARGEST:
            raise self._error(role, f"its shape {list(shape)} is larger than any of Wan")

    def _check_declared(self, shape: tuple[int, ...]) -> None:
        """A declared shape is that of the weight which the adapter was trained on; it says nothing new."""
        if self._shape("reshape", axes=1)[0] > 8:
            raise self._error("reshape", "a declared shape has at most 8 axes")
        declared = [int(size) for size in self._tensors["reshape"].tolist()]
        if min(declared) < 1 or (declared[0], math.prod(declared[1:])) != (shape[0], math.prod(shape[1:])):
            raise self._error("reshape", f"the declared shape {declared} is not that of the adapter, {list(shape)}")

    def _shape(self, role: str, axes: int = 2) -> tuple[int, ...]:
        """The shape, with at least `axes` axes."""
        shape = tuple(self._tensors[role].shape)
        if len(shape) < axes:
            raise self._error(role, f"its shape {list(shape)} has fewer axes than {axes}")
        return shape

    def _require(self, *roles: str) -> None:
        missing = [role for role in roles if role not in self._keys]
        if missing:
            there = next(role for role in self._keys if role not in ("alpha", "magnitude"))
            raise self._error(there, f"its counterpart ({', '.join(missing)}) is missing")

    def _agree(self, what: str, first: str, a: int, second: str, b: int) -> None:
        if a != b:
            raise self._error(first, f"its {what} {a} (shape {list(self._tensors[first].shape)}) differs from {b} of "
                                     f"{self._keys[second]!r} (shape {list(self._tensors[second].shape)})")
        if what == "rank" and a > LARGEST_RANK:
            raise self._error(first, f"its rank {a} is larger than any layer of Wan")

    def _error(self, role: str, problem: str) -> LoadError:
        return LoadError(f"{self._label}, {self._keys[role]!r}: {problem}. {_DAMAGED}")


def group(file: TensorFile, keys: Mapping[str, Key]) -> dict[tuple[bool, str], dict[str, str]]:
    """Keys by (low noise, module) and role: {role: key}. Raises LoadError where two keys say the same."""
    layers: dict[tuple[bool, str], dict[str, str]] = {}
    for name, key in keys.items():
        roles = layers.setdefault((key.low_noise, key.module), {})
        if key.role in roles:
            raise LoadError(f"{file.path.name}: {roles[key.role]!r} and {name!r} are the same tensor of {key.module} "
                            "in two spellings. Keep one of them.")
        roles[key.role] = name
    return layers
