"""The product compiled for vectors of 16, 8 and 4 numbers: every form is widened to the same float32 by each."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

from treespec_compiler.codegen.cpu import build

PROGRAM = """
#include "attention.h"
#include "linear.h"
#include <cstdio>
#include <cstdlib>
using namespace treespec;

Strip treespec::float32_strip(int rows) { return STRIPS<Float32>[rows]; }

template <class Form, int HALVES>
void go(const char* name) {  // random bits, the highest bit of float16 and bfloat16 exponents cleared: finite numbers
  constexpr int K = 64 * RUNS<Form>, N = 45, P = 2, SIZE = K / Form::K_BLOCK * Form::BYTES;
  std::vector<char> w(P * SIZE + 64);
  srand(1);
  for (auto& c : w) c = rand();
  for (size_t i = 1; i < w.size(); i += 2)
    if (i % (Form::BYTES * RUNS<Form>) < HALVES) w[i] &= 0xbf;
  std::vector<float> wide(P * K * PANEL);
  for (int p = 0; p < P; ++p) widen<Form>(w.data() + p * SIZE, K, wide.data() + p * K * PANEL, w.data());
  int differing = 0;
  for (int M : {1, 2, 3, 4, 5, 7, 20, 60}) {
    std::vector<float> x(M * K), a(M * N), b(M * N);
    for (auto& v : x) v = rand() / 1e9f;
    linear_panels<Form>(x.data(), M, K, w.data(), nullptr, a.data(), N, 0, P);
    linear_panels<Float32>(x.data(), M, K, (const char*)wide.data(), nullptr, b.data(), N, 0, P);
    for (int i = 0; i < M * N; ++i) differing += std::memcmp(&a[i], &b[i], 4) != 0;
  }
  unsigned sum = 0;
  for (float v : wide) {
    unsigned bits;
    std::memcpy(&bits, &v, 4);
    sum = sum * 31 + bits;
  }
  std::printf("%s %d %u\\n", name, differing, sum);
}

int main() {
  go<BFloat16, 64>("bfloat16"), go<Float16, 64>("float16"), go<Bytes<false>, 64>("q8_0"), go<Bytes<true>, 128>("i8");
  go<Nibbles<true>, 128>("q4_1"), go<Nibbles<false>, 64>("q4_0"), go<Nibbles<false, 4, true>, 128>("i4");
  go<Nibbles<true, 5>, 128>("q5_1"), go<Nibbles<false, 5>, 64>("q5_0");
  go<BitsK<4>, 128>("q4_k"), go<BitsK<5>, 128>("q5_k"), go<SixBitsK, 64>("q6_k");
}
"""


@pytest.mark.rare
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86")
def test_every_vector_width_gives_the_same(tmp_path: Path) -> None:
    try:
        cxx = build.compiler()
    except build.BuildError:
        pytest.skip("no C++ compiler")
    (tmp_path / "widths.cpp").write_text(PROGRAM)
    said = []
    for target in ("native", "haswell", "x86-64-v2"):  # the CPU's own, AVX2, and the vector extensions alone
        to = tmp_path / target
        flags = ["-std=c++20", "-O1", f"-march={target}", "-ffp-contract=fast", f"-I{build.SOURCES[0].parent}"]
        subprocess.run([cxx, *flags, str(tmp_path / "widths.cpp"), "-o", str(to)], check=True, timeout=300)
        said.append(subprocess.run([str(to)], check=True, capture_output=True, text=True, timeout=60).stdout)
    assert said[0] == said[1] == said[2]
    assert [line.split()[1] for line in said[0].splitlines()] == ["0"] * 12
