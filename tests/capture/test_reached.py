"""What code reads besides its arguments is described so that a change of any of it shows, or cannot be read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from treespec_compiler.capture import installed, reached
from treespec_compiler.capture.reached import Reached, Unreadable, watched

HEAD = """
import collections, contextvars, dataclasses, enum, functools, itertools, math, operator, os, random, sys, threading
import time, types, weakref
import numpy as np
import torch
"""

# (what the code says, what makes what it reads, what changes it)
SEEN = {
    "global": ("A", "A = 4", "A = 9"),
    "shadowed builtin": ("max(3, 4)", "", "max = min"),
    "attribute of an object": ("A.w", "class C: w = 4\nA = C()", "A.w = 9"),
    "attribute of a class": ("A.w", "class A: w = 4", "A.w = 9"),
    "attribute of a base": ("A.w", "class B: w = 4\nclass A(B): pass", "B.w = 9"),
    "slot": ("A.w", "class C: __slots__ = ('w',)\nA = C(); A.w = 4", "A.w = 9"),
    "dict": ("A['w']", "A = {'w': 4}", "A['w'] = 9"),
    "nested": ("A['a'][0]['w']", "A = {'a': [{'w': 4}]}", "A['a'][0]['w'] = 9"),
    "object in a tuple": ("A[0].w", "class C: w = 4\nA = (C(),)", "A[0].w = 9"),
    "set": ("len(A)", "A = {4}", "A.add(9)"),
    "sign of zero": ("A", "A = 0.0", "A = -0.0"),
    "bool": ("A", "A = 1", "A = True"),
    "dataclass": ("A.w", "@dataclasses.dataclass\nclass D:\n    w: int = 4\nA = D()", "A.w = 9"),
    "namespace": ("A.w", "A = types.SimpleNamespace(w=4)", "A.w = 9"),
    "order": ("next(iter(A))", "A = collections.OrderedDict(a=4, b=9)", "A.move_to_end('a')"),
    "deque": ("A[0]", "A = collections.deque([4, 9])", "A.rotate(1)"),
    "bytearray": ("A[0]", "A = bytearray([4])", "A[0] = 9"),
    "array": ("A[0]", "A = np.array([4])", "A[0] = 9"),
    "tensor": ("A[0]", "A = torch.tensor([4])", "A[0] = 9"),
    "data of a tensor": ("A[0]", "A = torch.tensor([4])", "A.data[0] = 9"),
    "view of a mapping": ("A['w']", "B = {'w': 4}\nA = types.MappingProxyType(B)", "B['w'] = 9"),
    "chain of mappings": ("A['w']", "B = {'w': 4}\nA = collections.ChainMap({}, B)", "B['w'] = 9"),
    "weak reference": ("A().w", "class C: w = 4\nB = C()\nA = weakref.ref(B)", "B.w = 9"),
    "enumeration": ("A.X.value", "class A(enum.Enum): X = 4", "A.X._value_ = 9"),
    "attribute of a module": ("A.w", "A = types.ModuleType('A'); A.w = 4", "A.w = 9"),
    "function of a library": ("math.isqrt(16)", "math = types.ModuleType('m'); math.isqrt = abs", "math.isqrt = str"),
    "function replaced": ("A()", "def A(): return 4", "A = lambda: 9"),
    "code replaced": ("A()", "def A(): return 4", "A.__code__ = (lambda: 9).__code__"),
    "defaults": ("A()", "def A(w=4): return w", "A.__defaults__ = (9,)"),
    "contents of a default": ("A()", "def A(w=[4]): return w[0]", "A.__defaults__[0][0] = 9"),
    "keyword defaults": ("A()", "def A(*, w=4): return w", "A.__kwdefaults__['w'] = 9"),
    "attribute of a function": ("A.w", "def A(): pass\nA.w = 4", "A.w = 9"),
    "global of a function": ("A()", "W = 4\ndef A(): return W", "W = 9"),
    "global of its function": ("A()", "W = 4\ndef B(): return W\ndef A(): return B()", "W = 9"),
    "global of a comprehension": ("A()", "W = 4\ndef A(): return [W for _ in range(1)]", "W = 9"),
    "method": ("A().w()", "class A:\n    def w(self): return 4", "A.w = lambda self: 9"),
    "global of a method": ("A().w()", "W = 4\nclass A:\n    def w(self): return W", "W = 9"),
    "class method": ("A.w()", "class A:\n    K = 4\n    @classmethod\n    def w(cls): return cls.K", "A.K = 9"),
    "static method": ("A.w()", "W = 4\nclass A:\n    @staticmethod\n    def w(): return W", "W = 9"),
    "property": ("A().w", "W = 4\nclass A:\n    @property\n    def w(self): return W", "W = 9"),
    "cached property": ("A().w", "W = 4\nclass A:\n    @functools.cached_property\n    def w(self): return W", "W = 9"),
    "found by __getattr__": ("A.w", "D = {'w': 4}\nclass C:\n    def __getattr__(self, n): return D[n]\nA = C()",
                             "D['w'] = 9"),
    "object that is called": ("A()", "class C:\n    k = 4\n    def __call__(self): return self.k\nA = C()", "A.k = 9"),
    "bound method": ("A()", "class C:\n    k = 4\n    def get(self): return self.k\nB = C()\nA = B.get", "B.k = 9"),
    "partial": ("A()", "L = [4]\ndef f(l): return l[0]\nA = functools.partial(f, L)", "L[0] = 9"),
    "cached function": ("A()", "W = 4\n@functools.cache\ndef A(): return W", "W = 9"),
    "decorated": ("A()", "def deco(f):\n    @functools.wraps(f)\n    def g(): return f()\n    return g\n"
                  "W = 4\n@deco\ndef A(): return W", "W = 9"),
    "getter": ("A(B)", "class C: k = 4\nB = C()\nA = operator.attrgetter('k')", "B.k = 9"),
    "closure": ("A()", "def make():\n    w = 4\n    def get(): return w\n    def set(x):\n        nonlocal w; w = x\n"
                "    return get, set\nA, set_ = make()", "set_(9)"),
    "named tuple": ("A.w", "A = collections.namedtuple('A', 'w')(4)", "A = type(A)(9)"),
    "number of a class": ("A + 1", "class C(int): pass\nA = C(4)", "A = C(9)"),
    "text of a class": ("A + ''", "class C(str): pass\nA = C('a')", "A = C('b')"),
    "whole number of an enumeration": ("A + 1", "class E(enum.IntEnum):\n    X = 4\n    Y = 9\nA = E.X", "A = E.Y"),
    "method of a list": ("A(4)", "L = [4]\nA = L.index", "L.insert(0, 9)"),
}  # fmt: skip

UNREADABLE = {
    "clock": ("time.time()", ""),
    "clock by name": ("A()", "from time import time as A"),
    "clock inside": ("A()", "def A():\n    import time\n    return time.time()"),
    "random": ("random.random()", ""),
    "environment": ("os.environ['A']", ""),
    "environment by name": ("A('A')", "A = os.getenv"),
    "address": ("id(A)", "A = [4]"),
    "plain object": ("A", "A = object()"),
    "counter": ("next(A)", "A = itertools.count()"),
    "generator": ("next(A)", "A = (i for i in range(9))"),
    "iterator": ("next(A)", "A = iter([4])"),
    "of a thread": ("A.w", "A = threading.local(); A.w = 4"),
    "of a context": ("A.get()", "A = contextvars.ContextVar('A', default=4)"),
    "frame": ("sys._getframe().f_lineno", ""),
    "threads of torch": ("torch.get_num_threads()", ""),
    "gradients of torch": ("torch.is_grad_enabled()", ""),
    "seed": ("torch.manual_seed(0)", ""),
    "weights": ("A.weight", "A = torch.nn.Linear(2, 2)"),
    "weight": ("A", "A = torch.nn.Parameter(torch.ones(2))"),
    "weight in a closure": (
        "A()",
        "def make():\n    m = torch.nn.Linear(2, 2)\n    return lambda: m.weight\nA = make()",
    ),
    "evaluated": ("eval('4')", ""),
    "all globals": ("globals()['A']", "A = 4"),
    "printed": ("print(4)", ""),
    "subclass of tensors": ("A", "class C(torch.Tensor): pass\nA = torch.ones(2).as_subclass(C)"),
    "generator of torch": ("torch.randn(2, generator=A)", "A = torch.Generator()"),
    "generator of numpy": ("A.random()", "A = np.random.default_rng(0)"),
    "raises when asked": (
        "A.w",
        "class C:\n    __slots__ = ()\n    def __getattr__(self, n): raise KeyError(n)\nA = C()",
    ),
    "without end": ("A", "A = [[i] for i in range(9000)]"),
}


def made(says: str, before: str) -> tuple[FunctionType, dict[str, Any]]:
    names: dict[str, Any] = {"__name__": __name__}  # `dataclasses` asks for a module that is there
    exec(HEAD + before + f"\ndef fill():\n    return {says}", names)
    return names["fill"], names


@pytest.mark.parametrize("case", SEEN)
def test_a_change_shows(case: str) -> None:
    says, before, change = SEEN[case]
    fill, names = made(says, before)
    changed = watched(fill.__code__, names, [], ())
    fill()
    assert not changed()
    exec(change, names)
    assert changed()


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_described_is_not_read(case: str) -> None:
    fill, names = made(*UNREADABLE[case])
    with pytest.raises(Unreadable):
        Reached(fill.__code__, names)


def test_what_is_not_read_may_change() -> None:
    fill, names = made("A.w + len(M)", "class C: w = 4\nA = C()\nB = C()\nW = 4\nM = [W]")
    changed = watched(fill.__code__, names, [], ())
    exec("B.w = 9\nW = 9\nnew = 4", names)
    assert not changed()


def test_a_dict_that_is_filled_may_grow() -> None:
    fill, names = made("A[0]", "A = {0: torch.ones(3)}")
    dicts = Reached(fill.__code__, names).dicts
    assert [*dicts.values()] == [names["A"]]
    changed = watched(fill.__code__, names, [], dicts)
    exec("A[1] = torch.ones(4)", names)
    assert not changed()
    exec("A[1] = 4", names)
    assert changed()


def test_numbers_are_told() -> None:
    fill, names = made("A() + 31", "S = {777}\ndef A(w=55): return 33 in S")
    assert {31, 33, 55, 777} <= Reached(fill.__code__, names).numbers


def test_a_loop_of_references_ends() -> None:
    fill, names = made("A[0]", "A = [4]\nA.append(A)")
    assert not watched(fill.__code__, names, [], ())()


def test_the_default_dtype_is_read() -> None:
    fill, names = made("torch.ones(2)", "")
    changed = watched(fill.__code__, names, [], ())
    torch.set_default_dtype(torch.float64)
    try:
        assert changed()
    finally:
        torch.set_default_dtype(torch.float32)
    assert not changed()


@pytest.mark.parametrize("package", ["mine", "theirs"])
def test_of_an_installed_package_the_models_own_is_read(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reached, "LIBRARIES", ("<string>",))
    names: dict[str, Any] = {"__name__": "mine.model"}
    helper: dict[str, Any] = {"__name__": f"{package}.helper"}
    exec("W = 4\ndef A(): return W", helper)
    names["A"] = helper["A"]
    exec("def fill():\n    return A()", names)
    changed = watched(names["fill"].__code__, names, [], ())
    helper["W"] = 9
    assert changed() == (package == "mine")


def test_packages_of_another_environment_on_the_path_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an environment that is made over another one: what lies there is taken on trust, and not gone through."""
    there = tmp_path / "other" / "site-packages"
    beside = tmp_path / "beside"
    monkeypatch.setattr(sys, "path", [*sys.path, str(there), str(beside)])
    found = installed.packages()
    assert str(there) in found and str(beside) not in found
