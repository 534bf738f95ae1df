"""A few thousand instructions to train a draft on, made from templates; nothing is downloaded.

    python examples/training_prompts.py --count 4000 --out build/prompts.jsonl
    treespec train-draft smollm2 --kind eagle3 --prompts build/prompts.jsonl --out build/head

Eight kinds of tasks in turn: code, extraction, summaries, questions about a passage, mathematics, translation,
knowledge, writing. Passages are docstrings of the running Python's standard library. With --exclude FILE (JSON Lines),
a prompt that occurs in that file, such as a benchmark's, is left out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

TOPICS = """
black holes|photosynthesis|the water cycle|plate tectonics|vaccines|inflation|supply and demand|the French
Revolution|the Roman Empire|jazz music|impressionist painting|classical logic|probability|prime
numbers|electric cars|solar panels|wind power|coral reefs|bees|migratory birds|volcanoes|earthquakes|the
immune system|sleep|memory|stress|a balanced diet|marathon training|chess|gardening|bread
baking|coffee|tea|photography|public speaking|job interviews|time management|budgeting|remote
work|teamwork|leadership|climate change|recycling|space travel|the Moon|Mars|the printing press|the steam
engine|the Internet|encryption|databases|machine learning|operating systems|version control|software
testing|open source|web browsers|GPS|semiconductors|batteries|bridges|architecture|city
planning|libraries|museums|the Olympic
Games|football|swimming|mountaineering|sailing|railways|aviation|ancient Egypt|the Silk Road|the
Renaissance|the Industrial Revolution|democracy|human rights|international
trade|taxes|insurance|education|languages|poetry|novels|theatre|film|folk tales|mythology|philosophy of
science|ethics|psychology of habits|optical illusions|music theory|the violin|the
piano|origami|knitting|pottery|beekeeping|astronomy for
beginners|tides|rivers|deserts|rainforests|glaciers|islands
"""
CODE = """
reverses a string|checks whether a word is a palindrome|counts the vowels in a text|finds the largest number
in a list|removes duplicates from a list and keeps the order|merges two sorted lists|computes the nth
Fibonacci number|computes a factorial|tests whether a number is prime|returns the prime factors of a
number|computes the greatest common divisor|sorts a list by bubble sort|sorts a list by quicksort|searches a
sorted list by bisection|counts words in a file|reads a CSV file and sums a column|parses a date in the form
YYYY-MM-DD|converts Celsius to Fahrenheit|converts a number to Roman numerals|converts a Roman numeral to a
number|validates an e-mail address|transposes a matrix|multiplies two matrices|flattens a nested list|groups
words by their first letter|finds the longest common prefix of strings|checks balanced brackets|implements a
stack|implements a queue with two stacks|implements a linked list|inverts a binary tree|walks a tree level
by level|finds the shortest path in a grid|detects a cycle in a graph|computes a moving average|draws a
random sample|shuffles a deck of cards|plays rock, paper, scissors|simulates a bank account|encodes text in
Morse code|applies a Caesar cipher|compresses a string by run lengths|finds anagrams in a list of
words|generates all permutations|generates all subsets|rounds to the nearest multiple of five|counts the
bits of an integer|converts a number to binary|finds missing numbers in a range|rotates a list by k
places|implements a least-recently-used cache|retries a function three times|times a function|writes a
dictionary to a JSON file|downloads nothing and prints a progress bar|formats a number of bytes for people
"""
LANGUAGES = ("Python", "JavaScript", "Java", "C", "Rust", "Go")
NAMES = "Anna Weber|Luis Ortega|Mei Tanaka|Omar Haddad|Sofia Rossi|John Miller|Priya Nair|Erik Larsen|Fatima Khan"
CITIES = "Berlin|Madrid|Osaka|Cairo|Milan|Chicago|Mumbai|Oslo|Lahore|Prague|Lisbon|Toronto|Nairobi|Lima|Seoul"
JOBS = "nurse|engineer|teacher|baker|lawyer|pilot|designer|accountant|gardener|journalist"
THINGS = "apples|books|pencils|tickets|marbles|stamps|cups|chairs|bottles|coins"
SENTENCES = """
The train leaves at {n} o'clock.|I would like a table for {m} people.|Where is the nearest pharmacy?|My
brother works as a {job} in {city}.|We bought {n} {things} at the market.|It has been raining since
Monday.|Could you speak more slowly, please?|The meeting was moved to next week.|{name} lives in {city} and
works as a {job}.|She forgot her umbrella at the office.|The museum is closed on Mondays.|How much does this
cost?|They have known each other for {m} years.
"""
TONGUES = ("French", "German", "Spanish", "Italian", "Portuguese")


def words(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("|") if part.strip()]


@functools.cache
def passages(low: int = 250, high: int = 1400, most: int = 600) -> list[str]:
    """The first docstrings of the standard library of that many characters, in the order of their files."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if len(found) >= most:
            break
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if low <= len(text) <= high:
                    found.append(text)
    return list(dict.fromkeys(found))


class Maker:
    """One prompt of each kind, with what the draw gives."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.topics, self.tasks, self.texts = words(TOPICS), words(CODE), passages()

    def filled(self, text: str) -> str:
        draw = self.draw
        slots = {"name": NAMES, "city": CITIES, "job": JOBS, "things": THINGS}
        found = {slot: draw.choice(words(values)) for slot, values in slots.items()}
        return text.format(n=draw.randrange(2, 13), m=draw.randrange(2, 9), **found)

    def code(self) -> str:
        language = self.draw.choice(LANGUAGES) if self.draw.random() < 0.4 else "Python"
        forms = (
            "Write a {language} function that {task}.",
            "Write {language} code that {task}. Add comments.",
            "Show me how to write a {language} program that {task}, with an example.",
            "I need a {language} function which {task}. Explain it step by step.",
            "Write a {language} function that {task}, and tests for it.",
        )
        return self.draw.choice(forms).format(language=language, task=self.draw.choice(self.tasks))

    def extraction(self) -> str:
        rows = [
            self.filled("{name}, a {job} from {city}, ordered {n} {things}")
            + f" for {self.draw.randrange(5, 400)} euros"
            for _ in range(self.draw.randrange(2, 6))
        ]
        forms = (
            "Extract the names and cities from these records as a JSON list:\n",
            "Make a table of name, profession, city, item and price:\n",
            "Which amounts of money occur in this text, and who paid them?\n",
            "List every person in the following lines with what they ordered:\n",
        )
        return self.draw.choice(forms) + "\n".join(rows)

    def summary(self) -> str:
        forms = (
            "Summarize the following text in two sentences:\n\n",
            "Give the main points of this text as a list:\n\n",
            "Explain the following documentation to a beginner:\n\n",
            "Rewrite this text so that it is shorter:\n\n",
        )
        return self.draw.choice(forms) + self.draw.choice(self.texts)

    def passage(self) -> str:
        forms = (
            "Answer from the context alone.\n\nContext: {text}\n\nQuestion: What is described here, and what for?",
            "Here is a document:\n\n{text}\n\nQuestion: What does it say about arguments and results?",
            "Read this passage.\n\n{text}\n\nWhich terms does it introduce? Quote the sentences.",
            "Document:\n{text}\n\nIs there anything that may go wrong, according to the document?",
        )
        return self.draw.choice(forms).format(text=self.draw.choice(self.texts))

    def mathematics(self) -> str:
        draw = self.draw
        a, b, c = draw.randrange(3, 60), draw.randrange(2, 25), draw.randrange(2, 9)
        forms = (
            "{name} has {a} {things} and buys {c} boxes of {b} more. How many {things} are there now?",
            "A {job} earns {a} euros an hour and works {b} hours a week. How much is that in {c} weeks?",
            "{name} reads {a} pages a day. How many days does a book of {d} pages take?",
            "Solve for x: {c}x + {b} = {d}. Show your steps.",
            "A train runs {a} km in {c} hours. How far does it run in {b} hours at the same speed?",
            "What is {a} percent of {d}? Explain the calculation.",
        )
        text = draw.choice(forms)
        for slot, value in (("{a}", a), ("{b}", b), ("{c}", c), ("{d}", a * c + b)):
            text = text.replace(slot, str(value))
        return self.filled(text)

    def translation(self) -> str:
        sentences = " ".join(self.filled(s) for s in self.draw.sample(words(SENTENCES), self.draw.randrange(1, 4)))
        return f"Translate into {self.draw.choice(TONGUES)}: {sentences}"

    def knowledge(self) -> str:
        forms = (
            "What should everybody know about {topic}?",
            "Explain {topic} to a child of {m} years.",
            "What are common misunderstandings about {topic}?",
            "Give {m} facts about {topic}.",
            "How did {topic} change over time?",
            "What is the most important idea in {topic}?",
        )
        return self._of_topic(forms)

    def writing(self) -> str:
        forms = (
            "Write a short blog post about {topic}.",
            "Write an e-mail to {name} that invites to a talk about {topic} in {city}.",
            "Write a short story in which a {job} learns something about {topic}.",
            "Write a poem about {topic} in {m} lines.",
            "Make a plan of {m} steps for somebody who wants to learn about {topic}.",
            "Write a speech of one minute for a {job} about {topic}.",
        )
        return self._of_topic(forms)

    def _of_topic(self, forms: tuple[str, ...]) -> str:
        return self.filled(self.draw.choice(forms).replace("{topic}", self.draw.choice(self.topics)))


def prompts(count: int, seed: int, excluded: str = "") -> Iterator[tuple[str, str]]:
    """Different (kind, prompt), kinds in turn."""
    maker = Maker(seed)
    kinds: list[Callable[[], str]] = [maker.code, maker.extraction, maker.summary, maker.passage]
    kinds += [maker.mathematics, maker.translation, maker.knowledge, maker.writing]
    seen: set[str] = set()
    for number in range(20 * count):
        make = kinds[number % len(kinds)]
        text = make()
        if text not in seen and (not excluded or json.dumps(text)[1:-1] not in excluded):
            seen.add(text)
            yield make.__name__, text
        if len(seen) == count:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exclude", type=Path, help="JSON Lines whose texts are left out")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    excluded = "" if args.exclude is None else args.exclude.read_text(encoding="utf-8")
    found = [{"kind": kind, "prompt": text} for kind, text in prompts(args.count, args.seed, excluded)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(one) + "\n" for one in found), encoding="utf-8")
    print(f"{len(found)} prompts in {args.out}")


if __name__ == "__main__":
    main()
