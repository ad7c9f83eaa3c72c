"""Wrong versions of the bounds: one small change each to the text of a file of hbmeta/bounds.

`mutated` replaces a substring, which must occur exactly once, and runs the whole package anew with
it under its own name, so that every function that uses the changed one uses the changed one.
"""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import hbmeta.bounds

FOLDER = Path(hbmeta.bounds.__file__).parent
NAME = "hbmeta.bounds"
# Each imports only those before it.
FILES = [
    "checks",
    "bound",
    "inverse",
    "differentiable",
    "objectives",
    "divergences",
    "expected_divergences",
    "single_task",
    "hold_out",
    "query_split",
    "pentina_lampert",
    "amit_meir",
    "separate_roots",
    "joint",
    "__init__",
]

# file, text, what stands there in its place
MUTANTS = [
    # kl inverse
    ("inverse", "1e280) * (1.0 + MARGIN)", "1e280) * 2.0"),
    ("inverse", "a * _psi(left, -t) + b", "a * _psi(left, -t) - b"),
    ("inverse", "b * _psi(growth, np.log1p(growth))", "b * _psi(growth, growth)"),
    ("inverse", "growth = -a * left / b", "growth = -b * left / a"),
    ("inverse", "near * r - 2.0 * r * tail", "near * r - r * tail"),
    ("inverse", "1.0 / (2 * k + 1)", "1.0 / (2 * k - 1)"),
    ("inverse", "growing - shrinking * np.expm1(-t)", "growing + shrinking * np.expm1(-t)"),
    ("inverse", "-np.expm1(-c))", "c)"),
    ("inverse", "np.where((q == 1.0) | (c == 0.0), q, p)", "np.where(q == 1.0, q, p)"),
    ("inverse", "np.where(inside, q, 0.5), np.where(inside, 1.0 - q, 0.5)",
     "np.where(inside, 1.0 - q, 0.5), np.where(inside, q, 0.5)"),
    ("inverse", "np.exp(-np.where(inside, t, c))", "np.exp(-t)"),
    # one task
    ("single_task", "np.log(n / delta)) / (2.0 * (n - 1.0))", "np.log(n / delta)) / (2.0 * n)"),
    ("single_task", "(kl + np.log(n / delta)) / (2.0", "(kl + np.log(1.0 / delta)) / (2.0"),
    ("single_task", "(kl + np.log(n / delta)) / (2.0", "(kl + np.log(n * delta)) / (2.0"),
    ("single_task", "np.log(n / delta)) / (2.0", "np.log(n / delta)) / (1.0"),
    ("single_task", "np.sqrt(0.5 * _complexity", "np.sqrt(_complexity"),
    ("single_task", "np.log(2.0 * np.sqrt(n) / delta)) / n", "np.log(1.0 / delta)) / n"),
    ("single_task", "np.log(2.0 * np.sqrt(n) / delta)) / n", "np.log(np.sqrt(n) / delta)) / n"),
    ("single_task", "np.log(2.0 * np.sqrt(n) / delta)) / n", "np.log(2.0 * n / delta)) / n"),
    ("single_task", "np.log(2.0 * np.sqrt(n) / delta)) / n",
     "np.log(2.0 * np.sqrt(n) / delta)) / (n - 1.0)"),
    ("single_task", "np.log(2.0 * np.sqrt(n) / delta)) / n",
     "np.log(4.0 * np.sqrt(n) / delta)) / n"),
    ("single_task", "c + np.sqrt(c * (c + 2.0 * risk))", "c + np.sqrt(c * (c + risk))"),
    ("single_task", "np.sqrt(2.0 * risk * c) + 2.0 * c", "np.sqrt(2.0 * risk * c) + c"),
    ("single_task", "np.sqrt(2.0 * risk * c) + 2.0 * c", "np.sqrt(risk * c) + 2.0 * c"),
    ("single_task", "(1.0 + np.sqrt(1.0 + 2.0 * risk / c))", "(1.0 + np.sqrt(1.0 + risk / c))"),
    ("single_task", "keep = 1.0 - 0.5 * chosen", "keep = 1.0 - chosen"),
    ("single_task", "c / (chosen * keep)", "c / chosen"),
    ("single_task", "(kl - np.log(delta)) / n\n", "kl / n\n"),
    ("single_task", "exponent = chosen * risk", "exponent = risk"),
    ("single_task", "/ np.expm1(-chosen)", "/ -chosen"),
    # held out
    ("hold_out", "kl_inverse(mean, -np.log(delta) / n)",
     "kl_inverse(mean, -np.log(0.5*delta) / n)"),
    ("hold_out", "kl_inverse(mean, -np.log(delta) / n)",
     "kl_inverse(mean, -np.log(delta) / (n-1))"),
    ("hold_out", "kl_inverse(mean, -np.log(delta) / n)",
     "mean + np.sqrt(-np.log(delta) / (2 * n))"),
    ("hold_out", "beta.ppf(1.0 - delta, k + 1.0", "beta.ppf(1.0 - 0.5 * delta, k + 1.0"),
    ("hold_out", "beta.ppf(1.0 - delta, k + 1.0", "beta.ppf(1.0 - delta, k"),
    ("hold_out", "np.maximum(n - k, 0.5)", "n - k + 1.0"),
    ("query_split", "np.log(2.0 * np.sqrt(T) / given.delta)", "np.log(1.0 / given.delta)"),
    ("query_split", "np.log(2.0 * np.sqrt(T) / given.delta)", "np.log(2.0 * T / given.delta)"),
    ("query_split", "kl_inverse(mean, (given.hyper_kl + ", "kl_inverse(mean, ("),
    # Pentina and Lampert
    ("pentina_lampert", "1.0 / np.asarray((1.0 / given.n_samples).mean(-1))",
     "given.n_samples.mean(-1)"),
    ("pentina_lampert", "np.log(2.0 / given.delta)", "np.log(1.0 / given.delta)"),
    ("pentina_lampert", "lam / (8.0 * T)", "lam / (4.0 * T)"),
    ("pentina_lampert", "lam / (8.0 * T)", "lam / (8.0 * harmonic)"),
    ("pentina_lampert", "beta / (8.0 * harmonic)", "beta / (8.0 * T)"),
    ("pentina_lampert", "given.hyper_kl + given.summed_task_kls", "given.summed_task_kls"),
    ("pentina_lampert", "paid / (T * beta)", "paid / beta"),
    ("pentina_lampert", "np.sqrt(T), where)", "np.sqrt(harmonic), where)"),
    # Amit and Meir
    ("amit_meir", "np.log(2.0 * given.column(\"n_tasks\") * m", "np.log(2.0 * m"),
    ("amit_meir", "np.log(2.0 * given.column(\"n_tasks\") * m",
     "np.log(given.column(\"n_tasks\") * m"),
    ("amit_meir", "np.log(2.0 * given.column(\"n_tasks\") * m",
     "np.log(4.0 * given.column(\"n_tasks\") * m"),
    ("amit_meir", "paid = given.column(\"hyper_kl\") + given.task_kls", "paid = given.task_kls"),
    ("amit_meir", "paid / (2.0 * (m - 1.0))", "paid / (2.0 * m)"),
    ("amit_meir", "paid / (2.0 * (m - 1.0))", "paid / (2.0 * (given.column(\"n_tasks\") - 1.0))"),
    ("amit_meir", "np.sqrt(paid / (2.0 * (m - 1.0))).mean(-1)",
     "np.sqrt((paid / (2.0 * (m - 1.0))).mean(-1))"),
    ("amit_meir", "np.log(2.0 * T / delta)) / (2.0 * (T - 1.0))",
     "np.log(2.0 * T / delta)) / (2.0 * T)"),
    ("amit_meir", "np.log(2.0 * T / delta)) / (2.0 * (T - 1.0))",
     "np.log(T / delta)) / (2.0 * (T - 1.0))"),
    ("amit_meir", "np.log(2.0 * T / delta)) / (2.0 * (T - 1.0))",
     "np.log(2.0 * T)) / (2.0 * (T - 1.0))"),
    ("amit_meir", "np.log(4.0 * given.column(\"n_tasks\") * np.sqrt(m)",
     "np.log(2.0 * given.column(\"n_tasks\") * np.sqrt(m)"),
    ("amit_meir", "* np.sqrt(m) / given.column(\"delta\")", "* m / given.column(\"delta\")"),
    ("amit_meir", "c = (given.column(\"hyper_kl\") + given.task_kls", "c = (given.task_kls"),
    ("amit_meir", "np.log(2.0 * T / delta)) / (2.0 * (T - 1.0))", "np.log(2.0 * T / delta)) / T"),
    ("amit_meir", "np.log(4.0 * np.sqrt(T) / delta)) / T", "np.log(2.0 * np.sqrt(T) / delta)) / T"),
    ("amit_meir", "kl_inverse(given.risk, c).mean(-1)",
     "kl_inverse(given.mean_risk, c.mean(-1))"),
    # separate roots
    ("separate_roots", "2.0 * T * (T - 1.0) * epsilon**2", "2.0 * T * epsilon**2"),
    ("separate_roots", "eta = T * epsilon +", "eta = epsilon +"),
    ("separate_roots", "given.delta) + eta", "given.delta)"),
    ("separate_roots", "np.log(2.0 * np.sqrt(m) / epsilon", "np.log(np.sqrt(m) / epsilon"),
    ("separate_roots", "np.log(2.0 * np.sqrt(T) / given.delta)", "np.log(2.0 * T / given.delta)"),
    ("separate_roots", "(given.task_kls + c) / (2.0 * m)",
     "(given.task_kls + c) / (2.0 * (m - 1))"),
    ("separate_roots", "np.asarray(0.5 / T)", "np.asarray(1.0 / T)"),
    ("separate_roots", "np.log(4.0 * given.column(\"n_tasks\") * m",
     "np.log(4.0 * given.column(\"n_tasks\")"),
    ("separate_roots", "np.log(4.0 * T / given.delta)", "np.log(4.0 * m / given.delta).mean(-1)"),
    ("separate_roots", "paid / (2.0 * (m - 1.0))", "paid / (2.0 * m)"),
    # joint
    ("joint", "np.log(4.0 * np.sqrt(T) / delta)) / T", "np.log(2.0 * np.sqrt(T) / delta)) / T"),
    ("joint", "across = (K_H + np.log", "across = (np.log"),
    ("joint", "n = T * given.n_samples.min(-1)", "n = given.n_samples.min(-1)"),
    ("joint", "n = T * given.n_samples.min(-1)", "n = T * given.n_samples.mean(-1)"),
    ("joint", "paid = K_H + given.summed_task_kls", "paid = given.summed_task_kls"),
    ("joint", "paid = K_H + given.summed_task_kls", "paid = K_H + given.task_kls.mean(-1)"),
    ("joint", "np.log(4.0 * np.sqrt(n) / delta)) / n", "np.log(2.0 * np.sqrt(n) / delta)) / n"),
    ("joint", "np.log(2.0 * n / delta)) / np.maximum(n - 1.0",
     "np.log(n / delta)) / np.maximum(n - 1.0"),
    ("joint", "np.maximum(n - 1.0, 1.0)", "np.maximum(n, 1.0)"),
    ("joint", "np.where(equal, alike, unlike)", "alike"),
    ("joint", "raw = kl_inverse(of_training_tasks, across)",
     "raw = kl_inverse(mean, within + across)"),
    # divergences
    ("divergences", "np.square(shift / prior + np.zeros(shape)).sum(-1)",
     "np.square(shift / prior + np.zeros(shape)).mean(-1)"),
    ("divergences", "np.broadcast_to(own / prior, shape)", "np.atleast_1d(own / prior)"),
    ("divergences", "np.expm1(log_ratio) - log_ratio", "np.expm1(log_ratio) + log_ratio"),
    ("divergences", "log_ratio = 2.0 * np.log(ratio)", "log_ratio = np.log(ratio)"),
    ("divergences", "ratio = np.linalg.solve(prior, own)", "ratio = np.linalg.solve(own, prior)"),
    ("divergences", "- np.square(columns).sum((-2, -1)) + squared(F)", "+ squared(F)"),
    ("divergences", "volume = np.subtract(", "volume = np.add("),
    ("divergences", "rel_entr(own, prior)", "rel_entr(prior, own)"),
    ("expected_divergences", "kl + 0.5 * np.broadcast_to", "kl + np.broadcast_to"),
    ("expected_divergences", "np.broadcast_to(np.square(kappa / s), mean.shape).sum(-1)",
     "np.square(kappa / s).sum()"),
    ("expected_divergences", "np.expm1(0.5 * squared_hyper)", "np.expm1(squared_hyper)"),
    ("expected_divergences", "(squared_hyper + inflated)", "inflated"),
    ("expected_divergences", "np.exp(0.5 * rho)", "np.exp(rho)"),
    ("expected_divergences", "(A - np.eye(d)) * kappa", "A * kappa"),
    # what all share
    ("bound", "np.minimum(raw, 1.0)", "raw"),
    ("bound", "raw = np.where(trivial, 1.0, raw)", ""),
    ("bound", "np.asarray(raw >= 1.0)", "np.asarray(raw > 2.0)"),
    ("checks", "self.n_tasks * self.task_kls.mean(-1)", "self.task_kls.sum(-1)"),
    ("checks", "np.asarray(self.risk.mean(-1))", "np.asarray(self.risk.max(-1))"),
    ("checks", "(array > 0.0) & (array < 1.0), where", "(array >= 0.0) & (array <= 1.0), where"),
    ("checks", "(array == np.floor(array))", "True"),
    ("checks", "array >= -SLACK, where, f\"{name} of 0", "array >= -1.0, where, f\"{name} of 0"),
]  # fmt: skip


@cache
def source(file: str) -> str:
    return (FOLDER / f"{file}.py").read_text(encoding="utf-8")


@cache
def compiled(file: str) -> types.CodeType:
    return compile(source(file), f"{file}.py", "exec")


def mutant(file: str, text: str, other: str) -> str:
    """The source of a file with one substring replaced; it must be there exactly once."""
    original = source(file)
    assert original.count(text) == 1, f"{text!r} is {original.count(text)} times in {file}.py"
    changed = original.replace(text, other)
    assert changed != original
    return changed


@contextmanager
def mutated(file: str, text: str, other: str) -> Iterator[types.ModuleType]:
    """The package `hbmeta.bounds` with one file changed; the true one is put back afterwards."""
    changed = compile(mutant(file, text, other), f"{file}.py, changed", "exec")
    true = {name: module for name, module in sys.modules.items() if name.startswith(NAME)}
    parent = importlib.import_module("hbmeta")
    try:
        for name in true:
            del sys.modules[name]
        package = types.ModuleType(NAME)
        package.__path__ = []
        sys.modules[NAME] = package
        for part in FILES:
            module = package
            if part != "__init__":
                module = types.ModuleType(f"{NAME}.{part}")
                sys.modules[module.__name__] = module
            exec(changed if part == file else compiled(part), vars(module))
            if part != "__init__":
                setattr(package, part, module)
        yield package
    finally:
        for name in [name for name in sys.modules if name.startswith(NAME)]:
            del sys.modules[name]
        sys.modules.update(true)
        parent.bounds = true[NAME]
