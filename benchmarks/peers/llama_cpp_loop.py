"""llama.cpp by llama-cpp-python: a worker of bench_cpu_peers.py, and the file's weights in another type.

python llama_cpp_loop.py FILE THREADS CONTEXT [lookup]
python llama_cpp_loop.py make TYPE FILE OTHER         # llama.cpp's own quantizer
"""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

from protocol import Answer, serve

TYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
"""llama.cpp's numbers of file types (llama.h, llama_ftype)."""


def made(kind: str, file: str, other: str) -> None:
    try:
        import llama_cpp
    except ImportError:
        sys.exit(3)  # as bench_cpu_peers.MISSING
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.allow_requantize, settings.ftype = True, TYPES[kind]
    if llama_cpp.llama_model_quantize(file.encode(), other.encode(), settings):
        sys.exit(f"llama.cpp made no {kind} of {file!r}")


def make(file: str, threads: int, context: int, lookup: bool) -> tuple[dict[str, Any], Answer]:
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=10) if lookup else None
    model = llama_cpp.Llama(
        file,
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=lookup,  # its speculation asks for them
        draft_model=draft,
        verbose=False,
    )

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        model.reset()
        ids: list[int] = []
        began = perf_counter()
        first = 0.0
        for token in model.generate(request["ids"], temp=0.0):
            first = first or perf_counter() - began
            ids.append(int(token))
            if len(ids) == request["new"]:
                break
        return {"ids": ids, "seconds": perf_counter() - began, "first": first}

    about = {"bytes": int(llama_cpp.llama_model_size(model.model)), "version": llama_cpp.__version__}
    return about | {"built": llama_cpp.llama_print_system_info().decode().strip()}, answer


if __name__ == "__main__":
    if sys.argv[1] == "make":
        made(*sys.argv[2:5])
    else:
        where, threads, context, *more = sys.argv[1:]
        serve(lambda: make(where, int(threads), int(context), "lookup" in more))
