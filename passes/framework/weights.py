"""The weight inputs of a graph: what each is made of, and the tensors that were built so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from treespec_compiler.ir.stored_weights import Pack
from treespec_compiler.ir.weights import Expression, Read, Source


class PackedBytes(int):
    """Bytes of tensors that are not the model's own; `forms` says how many of them each form takes."""

    forms: Mapping[str, int]

    @classmethod
    def of(cls, forms: Mapping[str, int]) -> PackedBytes:
        made = cls(sum(forms.values()))
        made.forms = dict(forms)
        return made

    def __repr__(self) -> str:
        parts = ", ".join(f"{form} {size:,}" for form, size in self.forms.items())
        return f"{int(self):,} bytes ({parts})" if parts else "0 bytes"


class Weights(Mapping[str, Expression]):
    """Weight expressions by placeholder name; `read` gives the present tensor of a source."""

    def __init__(self, read: Read, made: Mapping[str, Expression]) -> None:
        self.read = read
        self._made = dict(made)
        self.streamed: dict[str, Expression] = {}
        """What is no input any more: it comes in a slot, see `ir.streaming`."""
        self._built: dict[str, Tensor] = {}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By the same names: each is built when first asked for, and kept until one of its sources changed."""
        # NOTE made anew, not kept: a circle of the two would keep a model's tensors until garbage is looked for twice.
        return _Tensors(self)

    def __getitem__(self, name: str) -> Expression:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    @property
    def derived(self) -> dict[str, Expression]:
        """Those that are not a tensor of the model itself."""
        return {name: made for name, made in self._made.items() if not isinstance(made, Source)}

    @property
    def sources(self) -> set[str]:
        """Names of the model's tensors that anything is made of."""
        everything = (*self._made.values(), *self.streamed.values())
        return {source for made in everything for source in made.sources}

    def label(self, name: str) -> str:
        """The model's name of a tensor that is its own; "" of anything else."""
        made = self._made.get(name)
        return made.name if isinstance(made, Source) else ""

    def named(self, made: Expression) -> str | None:
        """The placeholder of an expression."""
        return next((name for name, known in self._made.items() if known == made), None)

    def tensor(self, name: str) -> Tensor:
        """The tensor of a placeholder, without gradients. Raises InvalidWeight as the expression does."""
        if name not in self._built:
            self._built[name] = self._made[name].build(self.read)
        return self._built[name]

    def streamed_tensor(self, name: str) -> Tensor:
        """As `tensor`, of a streamed one; it is not kept."""
        return self.streamed[name].build(self.read)

    def add(self, name: str, made: Expression) -> None:
        self._made[name] = made

    def drop(self, name: str) -> None:
        del self._made[name]
        self._built.pop(name, None)

    def stream(self, name: str) -> None:
        """From now on it is among the streamed ones."""
        self.streamed[name] = self._made[name]
        self.drop(name)

    def copy(self) -> Weights:
        """Another table of the same expressions; tensors that were built already are shared."""
        other = Weights(self.read, self._made)
        other._built.update(self._built)
        other.streamed.update(self.streamed)
        return other

    def changed(self, sources: Iterable[str]) -> list[str]:
        """Forget the tensors made of these sources, and no others; returns the names of all that is made of them."""
        other = set(sources)
        everything = self._made | self.streamed
        stale = [name for name, made in everything.items() if not other.isdisjoint(made.sources)]
        for name in stale:
            self._built.pop(name, None)
        return stale

    @property
    def own_bytes(self) -> PackedBytes:
        """Memory of all tensors that are not the model's own, by the form they have: their dtype, or a packed one's."""
        theirs = {_memory(self.read(name)) for name in self.sources}
        own = {_memory(t): (name, t.untyped_storage().nbytes()) for name, t in self.tensors.items()}
        forms: dict[str, int] = {}
        for memory, (name, size) in own.items():
            if memory not in theirs:
                form = _form(self._made[name])
                forms[form] = forms.get(form, 0) + size
        return PackedBytes.of(forms)


class _Tensors(Mapping[str, Tensor]):
    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self._weights.tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._weights  # without building it

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _form(made: Expression) -> str:
    if isinstance(made, Pack) and made.form != "float32":
        return made.form
    return str(made.dtype).removeprefix("torch.")


def _memory(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()
