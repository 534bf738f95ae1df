"""A model followed through its changes: what was made of it stays true of its weights, its mode and its code."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

from torch import nn

from ..capture.alone import alone
from ..capture.call import CallSpec
from ..capture.fills import as_it_was
from ..capture.surroundings import outside_autocast
from ..converted import Converted
from ..errors import Refusal, TreespecError, Unsupported
from ..logs import logger
from ..options import Options
from .cache import TreeCache
from .executor import Tally
from .made import Made
from .optimizer_steps import steps

log = logger(__name__)

# What was made of other states of a model's code, such as its adapters on and off, is kept without packed weights.
MAX_EARLIER = 3


class Followed:
    """A module, what is `made` of it now, and the caches that hold its K/V. Raises `Unsupported`."""

    def __init__(
        self, model: nn.Module, call: CallSpec, options: Options, tally: Tally, converted: Converted | None = None
    ) -> None:
        self.call, self.options, self.tally = call, options, tally
        self.caches: weakref.WeakSet[TreeCache] = weakref.WeakSet()
        self._tallies: dict[Hashable, Tally] = {}  # of variants, through rebuilds
        self._model = weakref.ref(model)
        self._earlier: list[Made] = []
        self._steps = steps()
        self._saves = converted is None  # what somebody watched is not what everybody gets
        self.made = self._build(model, converted)

    @property
    def model(self) -> nn.Module | None:
        """None: it is gone."""
        return self._model()

    def _build(self, model: nn.Module, converted: Converted | None = None, look: bool = True) -> Made:
        """Convert the model as it is, and leave it so. One that sets what its trace read is converted once it has.

        NOTE nothing is kept before the last refusal: a program goes on seeing that its model changed.
        """
        with alone(), outside_autocast():
            with as_it_was(model):
                made = self._settled(model, converted, look)
            if made.watch.touched():
                # A weight of the program is what forward set once and reads from then on: it stays set.
                made = self._settled(model, look=False)
            return made

    def _settled(self, model: nn.Module, converted: Converted | None = None, look: bool = True) -> Made:
        made = (self._found(model) if look and converted is None else None) or self._convert(model, converted)
        if made.otherwise(model):
            made = self._convert(model)
            if reason := made.otherwise(model):
                raise Unsupported(
                    Refusal.STATE,
                    f"the forward pass changes what it reads, and may be another function each time: {reason}",
                    way_out="move counters and other state of Python out of forward",
                )
        return made

    def _convert(
        self, model: nn.Module, converted: Converted | None = None, looked_at: Sequence[int] | None = None
    ) -> Made:
        return Made(model, self.call, self.options, self.tally, self._tallies, converted, looked_at)

    def _found(self, model: nn.Module) -> Made | None:
        """What was saved of this model, where it holds for it as it is."""
        from .saved import programs

        found = programs.find(model, self.call, self.options)
        if found is None:
            return None
        try:
            made = self._convert(model, found.converted, looked_at=found.sums)
            # Other weights may have a narrower form than those that it was made of.
            reason = made.unfit_anywhere() if made.made_of != found.sums else None
        except TreespecError as error:
            log.warning("the saved program %s is given up: %s", found.entry.path, error)
            programs.distrust(self.options, found.entry)
            return None
        if reason is not None:
            log.info("the saved program %s is not used: %s", found.entry.path, reason)
            return None
        made.saved = found.entry
        return made

    def keep(self) -> None:
        """Save what was made and compared with the model."""
        from .saved import programs

        model, made = self.model, self.made
        if programs.store_of(self.options) is None:
            return
        digest = made.converted.digest
        if self._saves and model is not None and made.saved is None and made.otherwise(model) is None:
            with alone(), outside_autocast():
                digest = programs.save(model, self.call, self.options, made.converted, made.made_of)
        made.executor.keep_code(digest)

    def distrust(self, reason: str) -> None:
        """What was found saved is not the model: it is converted, and saved in its place."""
        from .saved import programs

        model, saved = self.model, self.made.saved
        assert model is not None and saved is not None
        log.warning("the saved program %s is given up, and the model converted again: %s", saved.path, reason)
        programs.distrust(self.options, saved)
        self._outdate("the saved program was not the model")
        self.made = self._build(model, look=False)

    def look(self, contents: bool) -> None:
        """See `TreeProgram.check_weights`."""
        if contents and (reason := self.made.otherwise(self.model)):
            self._switch(reason)
        watch = self.made.watch
        if watch.touched() or watch.mode_changed():
            self.renew()
        elif contents or steps() != self._steps:
            self._steps = steps()
            if watch.deep_mode_changed() or watch.rearranged() or watch.contents_changed():
                self.renew()

    def rebuild(self, model: nn.Module, reason: str) -> None:
        """Convert it again; caches of what was made before are of no use any more."""
        self._outdate(reason)
        self.made = self._build(model)

    def renew(self, narrower: bool = False) -> None:
        """Take the module's present weights, whatever was noticed; rebuild when dtype, device or shape changed, or when
        a packed weight's form does not hold its new values (`narrower`: or a narrower one would).
        """
        model, watch = self.model, self.made.watch
        reason = watch.incompatible()
        if model is not None and (reason or watch.deep_mode_changed()):
            reason = reason or "the module switched between eval and train mode"
            log.info("rebuilding the tree program: %s", reason)
            self.rebuild(model, reason)
            return
        changes = watch.renew()
        if model is not None and (reason := self.made.unfit(changes, narrower)):
            log.info("rebuilding the tree program: %s", reason)
            self.rebuild(model, reason)
            return
        self.made.bind_weights(changes)
        log.info("bound %d weights anew, %d of them with other values", len(changes.any), len(changes.rewritten))
        if changes.rewritten:
            first, *others = sorted(changes.rewritten)
            reason = f"{first} got other values" if not others else f"{first} and {len(others)} more got other values"
            for cache in self.caches:
                cache._outdate(reason)

    def _switch(self, reason: str) -> None:
        """Take what is made of the model as it reads now: before, if it was so once, or anew."""
        model, before = self.model, self.made
        assert model is not None
        log.info("another program: %s", reason)
        self._outdate(f"the model's code or its state changed ({reason})")
        found = next((made for made in self._earlier if made.suits(model)), None)
        changes = found.watch.renew() if found is not None else None
        if found is None or changes is None or found.unfit(changes):
            self.made = self._build(model)
        else:
            self.made = found
            found.bind_weights(changes)
        before.rest()
        self._earlier = [before, *(made for made in self._earlier if made is not found)][:MAX_EARLIER]

    def _outdate(self, reason: str) -> None:
        for cache in list(self.caches):
            cache.stale = reason
        self.caches.clear()
