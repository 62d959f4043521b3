"""Write seeded chat conversations that leave a small teacher sure in places and torn in others.

    phrasebook.json ──writers──► exchanges ──shuffle, system turn──► conversations ──► .jsonl

A capital has one answer and a greeting has three; a random number between 100 and 999 has nine
hundred. One conversation in four is about languages in ten scripts, and there are lists, code,
emoji, reasoning and tool calls. A row is `{"id", "subject", "messages"}`; ids are unique and are
not row numbers, so that a reader that confuses the two is found out.

    python tests/teacher/make_conversations.py --output tests/teacher/conversations.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

Message = dict[str, Any]
Exchange = list[Message]
Row = dict[str, Any]

HELD_OUT_SEED, HELD_OUT_COUNT = 20_261, 400
FIRST_ID, ID_STEP = 1_000, 7
LONGEST_CHARACTERS = 2_000  # a conversation that is longer gets no further exchange
TOOLS = (
    {"name": "get_weather", "description": "Current weather", "parameters": {"city": "string"}},
    {"name": "roll_dice", "description": "Roll dice", "parameters": {"sides": "integer"}},
)
SKIES = {"sunny": "☀️", "cloudy": "☁️", "rainy": "🌧️", "snowy": "❄️", "windy": "💨", "foggy": "🌫️"}
BOOK: dict[str, Any] = json.loads(Path(__file__).with_name("phrasebook.json").read_text("utf-8"))
WORDS = {name: text.split() for name, text in BOOK.items() if isinstance(text, str)}
ENTRIES = {name: sorted(part.items()) for name, part in BOOK.items() if isinstance(part, dict)}

# Words and messages -------------------------------------------------------------------------------


def either(rng: random.Random, options: str) -> str:
    """Pick one of `a|b|c`, each option twice as likely as the one after it."""
    choices = options.split("|")
    return rng.choices(choices, [2.0**-rank for rank in range(len(choices))])[0]


def favour(rng: random.Random, words: Sequence[str]) -> str:
    """Pick a word by Zipf's law: the first often, the last seldom."""
    return rng.choices(words, [1 / (rank + 1) for rank in range(len(words))])[0]


def fill(rng: random.Random, sentence: str) -> str:
    """Replace every `{slot}` with a word of its own."""
    for slot in ("name", "adjective", "noun", "place"):
        while f"{{{slot}}}" in sentence:
            sentence = sentence.replace(f"{{{slot}}}", rng.choice(WORDS[f"{slot}s"]), 1)
    sentence = sentence.replace("{verb}", favour(rng, WORDS["verbs"]))
    sentence = sentence.replace("{small}", str(rng.randint(2, 20)))
    return with_articles(sentence.replace("{number}", str(rng.randint(100, 999))))


def with_articles(sentence: str) -> str:
    """Write `an` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)


def ask(question: str, answer: str) -> Exchange:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ask_either(rng: random.Random, questions: str, answers: str) -> Exchange:
    """Make one of several questions with one of several answers."""
    question = either(rng, questions)
    return ask(question, either(rng, answers))


def call_tool(question: str, name: str, arguments: Any, result: Any, answer: str) -> Exchange:
    """Make a tool call and its result; the arguments are JSON text, as chat servers send them."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    calls = [{"type": "function", "function": function}]
    said = {"role": "tool", "name": name, "content": json.dumps(result, ensure_ascii=False)}
    asked, answered = ask(question, answer)
    return [asked, {"role": "assistant", "content": "", "tool_calls": calls}, said, answered]


# Subjects: each function writes one exchange ------------------------------------------------------


def write_arithmetic(rng: random.Random) -> Exchange:
    """Write a sum of small numbers, one in three with its reasoning, in a field or the content."""
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    sign, total = rng.choice([("+", a + b), ("-", a - b), ("×", a * b)])
    task = f"{a} {sign} {b}"
    answers = f"{task} = {total}|{total}|The answer is {total}.|It is {total}."
    asked, answered = ask_either(rng, f"What is {task}?|{task} = ?|Calculate {task}.", answers)
    if rng.random() < 1 / 3:
        thought = f"{task} makes {total}."
        thought = either(rng, f"The user wants a number. {thought}|Let me see. {thought}|{thought}")
        if rng.random() < 0.5:
            answered["reasoning_content"] = thought
        else:
            answered["content"] = f"<think>\n{thought}\n</think>\n\n{answered['content']}"
    return [asked, answered]


def write_capital(rng: random.Random) -> Exchange:
    """Write a capital: one right answer in several phrasings."""
    country, city = rng.choice(ENTRIES["capitals"])
    if rng.random() < 0.3:
        question = f"Which country has the capital {city}?|{city} is the capital of …"
        return ask_either(rng, question, f"{country}.|{city} is the capital of {country}.")
    question = f"What is the capital of {country}?|Capital of {country}?|Name {country}'s capital."
    answers = f"The capital of {country} is {city}.|{city}.|It is {city}.|{city}, of course!"
    return ask_either(rng, question, answers)


def write_translation(rng: random.Random) -> Exchange:
    language, entries = rng.choice(ENTRIES["languages"])
    place = rng.randrange(len(WORDS["words"]))
    word, foreign = WORDS["words"][place], entries["words"].split()[place]
    if rng.random() < 0.3:
        meaning = f"It means “{word}” in {language}.|{language} for {word}."
        return ask_either(rng, f"What does “{foreign}” mean?|{foreign}?", meaning)
    question = f"How do you say {word} in {language}?|{word.capitalize()} in {language}, please."
    answer = f"“{foreign}”|{foreign}|In {language} it is “{foreign}”.|{word} = {foreign}"
    return ask_either(rng, question, answer)


def write_counting(rng: random.Random) -> Exchange:
    language, entries = rng.choice(ENTRIES["languages"])
    last = rng.randint(3, 10)
    numbers = entries["numbers"].split()[:last]
    listed = "\n".join(f"{place}. {number}" for place, number in enumerate(numbers, 1))
    answer = ", ".join(numbers) if rng.random() < 0.5 else listed
    return ask(f"Count to {last} in {language}.", answer)


def write_small_talk(rng: random.Random) -> Exchange:
    question, answers = rng.choice(rng.choice(ENTRIES["languages"])[1]["talk"])
    return ask(question, either(rng, answers))


def write_list(rng: random.Random) -> Exchange:
    """Write a list in no particular order: each item could be any that is left."""
    kind = rng.choice(["fruits", "animals", "colours", "tools"])
    count = rng.randint(3, 12)
    items = rng.sample(WORDS[kind], count)
    answers = {
        "bullets": "\n".join(f"- {item}" for item in items),
        "numbered": "\n".join(f"{place}. {item}" for place, item in enumerate(items, 1)),
        "sentence": f"{', '.join(items[:-1])} and {items[-1]}.",
    }
    answer = answers[rng.choice(["bullets", "numbered", "sentence"])]
    question = f"Name {count} {kind}.|Give me {count} {kind}.|I need {count} {kind} in a list."
    return ask(either(rng, question), answer)


def write_random_pick(rng: random.Random) -> Exchange:
    """Write a free choice, some among hundreds: the flattest distributions of all."""
    number, name = str(rng.randint(100, 999)), rng.choice(WORDS["names"])
    noun, adjective = rng.choice(WORDS["nouns"]), rng.choice(WORDS["adjectives"])
    return ask(*rng.choice([
        ("Pick a number between 100 and 999.", number),
        ("Give me a random three-digit number.", number),
        ("Give me five random numbers.", " ".join(str(rng.randint(100, 999)) for _ in range(5))),
        ("Pick a number between 1 and 10.", str(rng.choice([7, 7, 7, 3, 5, 8, 4, 2, 9, 6]))),
        ("Suggest a name for my cat.", either(rng, f"{name}|How about {name}?|{name} 🐱")),
        ("Say a random word.", rng.choice([noun, adjective])),
        ("Make up a password.", f"{adjective}-{noun}-{number}"),
        ("Flip a coin.", rng.choice(["Heads.", "Tails."])),
    ]))  # fmt: skip


def write_emoji(rng: random.Random) -> Exchange:
    thing, emoji = rng.choice(ENTRIES["emoji"])
    question = f"Which emoji stands for {thing}?|Emoji for {thing}?|Send me an emoji about {thing}."
    return ask_either(rng, question, emoji.replace(" ", "|"))


def write_code(rng: random.Random) -> Exchange:
    task, name, parameters, body = rng.choice(BOOK["functions"])
    docstring = f'    """{task.capitalize()}."""\n' if rng.random() < 0.4 else ""
    code = f"```python\ndef {name}({parameters}):\n{docstring}    {body}\n```"
    question = f"Write a Python function that {task}.|Python function that {task}?"
    lead = either(rng, "|Here is a function that does it:\n\n|This one:\n\n")
    return ask(either(rng, question), lead + code)


def write_record(rng: random.Random) -> Exchange:
    name, age, place = rng.choice(WORDS["names"]), rng.randint(5, 99), rng.choice(WORDS["places"])
    record = {"name": name, "age": age, "place": place}
    question = f"Write as JSON: {name} is {age} years old and works at the {place}."
    return ask(question, f"```json\n{json.dumps(record, indent=rng.choice([None, 2]))}\n```")


def write_weather(rng: random.Random) -> Exchange:
    city = rng.choice(sorted(BOOK["capitals"].values()))
    sky, degrees = favour(rng, list(SKIES)), rng.randint(-9, 39)
    answers = f"It is {sky} in {city}, {degrees} °C. {SKIES[sky]}|{degrees} °C and {sky}."
    answer = either(rng, f"{answers}|In {city} it is {sky} with {degrees} °C.")
    question = f"What is the weather in {city}?|Weather in {city}?|Is it warm in {city}?"
    result = {"city": city, "sky": sky, "celsius": degrees}
    return call_tool(either(rng, question), "get_weather", {"city": city}, result, answer)


def write_dice(rng: random.Random) -> Exchange:
    sides = rng.choice([6, 8, 12, 20, 100])
    roll = rng.randint(1, sides)
    answer = either(rng, f"You rolled a {roll}. 🎲|{roll}!|The die shows {roll}.")
    question = f"Roll a die with {sides} sides."
    return call_tool(question, "roll_dice", {"sides": sides}, {"roll": roll}, answer)


def write_story(rng: random.Random) -> Exchange:
    """Write a story of two to forty sentences: torn at most of its words."""
    sentences = rng.choice([2, 3, 4, 5, 6, 8, 12, 40])
    noun = rng.choice(WORDS["nouns"])
    story = [fill(rng, rng.choice(BOOK["sentences"])) for _ in range(sentences)]
    question = f"Tell me a story about a {noun}.|Write a story with a {noun} in it.|A story!"
    length = "Make it long. " if sentences > 8 else ""
    title = f"# The {rng.choice(WORDS['adjectives'])} {noun}\n\n" if rng.random() < 0.5 else ""
    return ask(length + with_articles(either(rng, question)), title + " ".join(story))


def write_advice(rng: random.Random) -> Exchange:
    place, noun = rng.choice(WORDS["places"]), rng.choice(WORDS["nouns"])
    question = f"Where can I find a {noun}?|I have lost my {noun}. Where should I look?"
    answers = (
        f"Try the {place}.|Have a look in the {place}.|Perhaps it is in the {place}.|"
        f"I would ask somebody at the {place}.|Most people find a {noun} near the {place}."
    )
    question, answer = with_articles(either(rng, question)), with_articles(either(rng, answers))
    opener = rng.choices(BOOK["openers"].split("|"), [8, 4, 2, 2, 1, 1, 1])[0]
    return ask(question, f"{opener}{answer} {either(rng, BOOK['closers'])}".rstrip())


WRITERS = {  # by subject: how often it comes up, so that no script is rare; who writes about it
    "advice": (1, [write_advice]),
    "chance": (2, [write_random_pick]),
    "code": (1, [write_code, write_record]),
    "emoji": (1, [write_emoji]),
    "geography": (1, [write_capital]),
    "languages": (5, [write_translation, write_counting, write_small_talk]),
    "lists": (1, [write_list]),
    "mathematics": (1, [write_arithmetic]),
    "stories": (2, [write_story]),
    "tools": (2, [write_weather, write_dice]),
}


# Conversations ------------------------------------------------------------------------------------


def write_conversation(rng: random.Random) -> tuple[str, list[Message]]:
    """Return a subject and the messages of one conversation of one to six exchanges."""
    subject = rng.choices([*WRITERS], [weight for weight, _ in WRITERS.values()])[0]
    messages: list[Message] = []
    if subject == "tools":  # they are always announced
        announced = "\n".join(["You can call these tools:", *map(json.dumps, TOOLS)])
        messages.append({"role": "system", "content": announced})
    elif rng.random() >= 0.7:
        messages.append({"role": "system", "content": fill(rng, rng.choice(BOOK["systems"]))})
    for _ in range(rng.choices([1, 2, 3, 4, 6], [55, 20, 12, 8, 5])[0]):
        if len(key_of(messages)) < LONGEST_CHARACTERS:
            messages += rng.choice(WRITERS[subject][1])(rng)
    return subject, messages


def iter_conversations(seed: int, *, unlike: frozenset[str] = frozenset()) -> Iterator[Row]:
    """Yield distinct conversations without end, none of which is among `unlike` (see `key_of`)."""
    rng, seen, number = random.Random(seed), set(unlike), 0
    while True:
        subject, messages = write_conversation(rng)
        if (key := key_of(messages)) not in seen:
            seen.add(key)
            yield {"id": FIRST_ID + ID_STEP * number, "subject": subject, "messages": messages}
            number += 1


def key_of(messages: list[Message]) -> str:
    """Return a text that two conversations share only when they are the same."""
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def make_held_out() -> list[Row]:
    return list(islice(iter_conversations(HELD_OUT_SEED), HELD_OUT_COUNT))


def make_training(seed: int, count: int) -> list[Row]:
    """Return training conversations; none is also held out."""
    held_out = frozenset(key_of(row["messages"]) for row in make_held_out())
    return list(islice(iter_conversations(seed, unlike=held_out), count))


def write_jsonl(path: Path, rows: list[Row]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out conversations as .jsonl.")
    parser.add_argument("--output", type=Path, required=True)
    write_jsonl(parser.parse_args().output, make_held_out())


if __name__ == "__main__":
    main()
