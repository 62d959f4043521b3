"""Write seeded chat conversations that leave a small teacher sure in places and torn in others.

    phrasebook.json ──writers──► exchanges ──shuffle, system turn──► conversations ──► .jsonl

A capital has one answer and a greeting has three; a random number between 100 and 999 has nine
hundred. One conversation in four is about languages in ten scripts, and there are lists, code,
emoji, reasoning and tool calls. A row is `{"id", "subject", "messages"}`; ids are unique and are
not row numbers, so that a reader that confuses the two is found out.

    python tests/teacher/make_conversations.py --output tests/teacher/conversations.jsonl
    python tests/teacher/make_conversations.py --seed 1 --count 9000 --output training.jsonl
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
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


# 1 Words ------------------------------------------------------------------------------------------


@functools.cache
def phrasebook() -> dict[str, Any]:
    path = Path(__file__).with_name("phrasebook.json")
    return json.loads(path.read_text(encoding="utf-8"))


@functools.cache
def bank(name: str) -> tuple[str, ...]:
    return tuple(phrasebook()[name].split())


def entry(rng: random.Random, section: str) -> tuple[str, Any]:
    """Pick a key and its value of a section of the phrasebook."""
    return rng.choice(sorted(phrasebook()[section].items()))


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
            sentence = sentence.replace(f"{{{slot}}}", rng.choice(bank(f"{slot}s")), 1)
    sentence = sentence.replace("{verb}", favour(rng, bank("verbs")))
    sentence = sentence.replace("{small}", str(rng.randint(2, 20)))
    return with_articles(sentence.replace("{number}", str(rng.randint(100, 999))))


def with_articles(sentence: str) -> str:
    """Write `an` before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", sentence)


# 2 Messages ---------------------------------------------------------------------------------------


def say(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def ask(question: str, answer: str) -> Exchange:
    return [say("user", question), say("assistant", answer)]


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
    return [asked, say("assistant", "", tool_calls=calls), said, answered]


# 3 Subjects: each writes one exchange -------------------------------------------------------------


def write_arithmetic(rng: random.Random) -> Exchange:
    """Write a sum of small numbers, one in three with its reasoning, in a field or the content."""
    a, b = rng.randint(2, 60), rng.randint(2, 39)
    sign, total = rng.choice([("+", a + b), ("-", a - b), ("×", a * b)])
    task = f"{a} {sign} {b}"
    asked, answered = ask_either(
        rng, f"What is {task}?|{task} = ?|Calculate {task}.",
        f"{task} = {total}|{total}|The answer is {total}.|It is {total}.",
    )  # fmt: skip
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
    country, city = entry(rng, "capitals")
    if rng.random() < 0.3:
        question = f"Which country has the capital {city}?|{city} is the capital of …"
        return ask_either(rng, question, f"{country}.|{city} is the capital of {country}.")
    question = f"What is the capital of {country}?|Capital of {country}?|Name {country}'s capital."
    answers = f"The capital of {country} is {city}.|{city}.|It is {city}.|{city}, of course!"
    return ask_either(rng, question, answers)


def write_translation(rng: random.Random) -> Exchange:
    language, entries = entry(rng, "languages")
    place = rng.randrange(len(bank("words")))
    word, foreign = bank("words")[place], entries["words"].split()[place]
    if rng.random() < 0.3:
        meaning = f"It means “{word}” in {language}.|{language} for {word}."
        return ask_either(rng, f"What does “{foreign}” mean?|{foreign}?", meaning)
    question = f"How do you say {word} in {language}?|{word.capitalize()} in {language}, please."
    answer = f"“{foreign}”|{foreign}|In {language} it is “{foreign}”.|{word} = {foreign}"
    return ask_either(rng, question, answer)


def write_counting(rng: random.Random) -> Exchange:
    language, entries = entry(rng, "languages")
    last = rng.randint(3, 10)
    numbers = entries["numbers"].split()[:last]
    listed = "\n".join(f"{place}. {number}" for place, number in enumerate(numbers, 1))
    answer = ", ".join(numbers) if rng.random() < 0.5 else listed
    return ask(f"Count to {last} in {language}.", answer)


def write_small_talk(rng: random.Random) -> Exchange:
    question, answers = rng.choice(entry(rng, "languages")[1]["talk"])
    return ask(question, either(rng, answers))


def write_list(rng: random.Random) -> Exchange:
    """Write a list in no particular order: each item could be any that is left."""
    kind = rng.choice(["fruits", "animals", "colours", "tools"])
    count = rng.randint(3, 12)
    items = rng.sample(bank(kind), count)
    style = rng.choice(["bullets", "numbered", "sentence"])
    if style == "sentence":
        answer = f"{', '.join(items[:-1])} and {items[-1]}."
    else:
        marks = [f"{place}. " if style == "numbered" else "- " for place in range(1, count + 1)]
        answer = "\n".join(mark + item for mark, item in zip(marks, items, strict=True))
    question = f"Name {count} {kind}.|Give me {count} {kind}.|I need {count} {kind} in a list."
    return ask(either(rng, question), answer)


def write_random_pick(rng: random.Random) -> Exchange:
    """Write a free choice, some among hundreds: the flattest distributions of all."""
    number, name = str(rng.randint(100, 999)), rng.choice(bank("names"))
    noun, adjective = rng.choice(bank("nouns")), rng.choice(bank("adjectives"))
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
    thing, emoji = entry(rng, "emoji")
    question = f"Which emoji stands for {thing}?|Emoji for {thing}?|Send me an emoji about {thing}."
    return ask_either(rng, question, emoji.replace(" ", "|"))


def write_code(rng: random.Random) -> Exchange:
    task, name, parameters, body = rng.choice(phrasebook()["functions"])
    docstring = f'    """{task.capitalize()}."""\n' if rng.random() < 0.4 else ""
    code = f"```python\ndef {name}({parameters}):\n{docstring}    {body}\n```"
    question = f"Write a Python function that {task}.|Python function that {task}?"
    lead = either(rng, "|Here is a function that does it:\n\n|This one:\n\n")
    return ask(either(rng, question), lead + code)


def write_record(rng: random.Random) -> Exchange:
    name, age, place = rng.choice(bank("names")), rng.randint(5, 99), rng.choice(bank("places"))
    record = {"name": name, "age": age, "place": place}
    question = f"Write as JSON: {name} is {age} years old and works at the {place}."
    return ask(question, f"```json\n{json.dumps(record, indent=rng.choice([None, 2]))}\n```")


def write_weather(rng: random.Random) -> Exchange:
    city = rng.choice(sorted(phrasebook()["capitals"].values()))
    sky, degrees = favour(rng, list(SKIES)), rng.randint(-9, 39)
    answer = either(
        rng, f"It is {sky} in {city}, {degrees} °C. {SKIES[sky]}|"
        f"{degrees} °C and {sky}.|In {city} it is {sky} with {degrees} °C."
    )  # fmt: skip
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
    noun = rng.choice(bank("nouns"))
    story = [fill(rng, rng.choice(phrasebook()["sentences"])) for _ in range(sentences)]
    question = f"Tell me a story about a {noun}.|Write a story with a {noun} in it.|A story!"
    length = "Make it long. " if sentences > 8 else ""
    title = f"# The {rng.choice(bank('adjectives'))} {noun}\n\n" if rng.random() < 0.5 else ""
    return ask(length + with_articles(either(rng, question)), title + " ".join(story))


def write_advice(rng: random.Random) -> Exchange:
    place, noun = rng.choice(bank("places")), rng.choice(bank("nouns"))
    question = f"Where can I find a {noun}?|I have lost my {noun}. Where should I look?"
    answers = (
        f"Try the {place}.|Have a look in the {place}.|Perhaps it is in the {place}.|"
        f"I would ask somebody at the {place}.|Most people find a {noun} near the {place}."
    )
    question, answer = with_articles(either(rng, question)), with_articles(either(rng, answers))
    opener = rng.choices(phrasebook()["openers"].split("|"), [8, 4, 2, 2, 1, 1, 1])[0]
    return ask(question, f"{opener}{answer} {either(rng, phrasebook()['closers'])}".rstrip())


WRITERS: dict[str, tuple[Callable[[random.Random], Exchange], ...]] = {
    "advice": (write_advice,),
    "chance": (write_random_pick,),
    "code": (write_code, write_record),
    "emoji": (write_emoji,),
    "geography": (write_capital,),
    "languages": (write_translation, write_counting, write_small_talk),
    "lists": (write_list,),
    "mathematics": (write_arithmetic,),
    "stories": (write_story,),
    "tools": (write_weather, write_dice),
}
# Languages come up most, so that no script is rare in the training text.
SUBJECT_WEIGHTS = {"languages": 5, "chance": 2, "stories": 2, "tools": 2}


# 4 Conversations ----------------------------------------------------------------------------------


def system_turn(rng: random.Random, subject: str) -> list[Message]:
    """Return a system turn, or none; tools are always announced in one."""
    if subject == "tools":
        return [say("system", "\n".join(["You can call these tools:", *map(json.dumps, TOOLS)]))]
    if rng.random() < 0.7:
        return []
    return [say("system", fill(rng, rng.choice(phrasebook()["systems"])))]


def write_conversation(rng: random.Random) -> tuple[str, list[Message]]:
    """Return a subject and the messages of one conversation of one to six exchanges."""
    subjects = sorted(WRITERS)
    weights = [SUBJECT_WEIGHTS.get(subject, 1) for subject in subjects]
    subject = rng.choices(subjects, weights)[0]
    messages = system_turn(rng, subject)
    for _ in range(rng.choices([1, 2, 3, 4, 6], [55, 20, 12, 8, 5])[0]):
        if len(key_of(messages)) < LONGEST_CHARACTERS:
            messages += rng.choice(WRITERS[subject])(rng)
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
    """Write the held-out set, or a training set when a seed is given."""
    parser = argparse.ArgumentParser(description="Write seeded chat conversations as .jsonl.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, help="of a training set; without it, the held-out set")
    parser.add_argument("--count", type=int, default=9_000, help="training conversations")
    args = parser.parse_args()
    rows = make_held_out() if args.seed is None else make_training(args.seed, args.count)
    write_jsonl(args.output, rows)
    print(json.dumps({"output": str(args.output), "conversations": len(rows)}))


if __name__ == "__main__":
    main()
