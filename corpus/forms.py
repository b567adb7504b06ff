"""Rows of JSON: read from JSONL or from a JSON array, and turned into conversations, whatever their form.

A conversation is a list of turns, each (question, answer). ROW_FORMS lists the forms that are recognised:

    {"question": …, "answer": …}
    {"messages": [{"role": "user", "content": …}, {"role": "assistant", "content": …}, …]}
    {"conversations": […]}              minimind's (role, content) and ShareGPT's (from, value)
    {"instruction": …, "input": …, "output": …}                                          Alpaca
    {"prompt": …, "response": …}        or "completion"

Two texts that belong together are joined by a line break: a system message and the first question, Alpaca's
instruction and its input.
"""

import codecs
import json
import re

from script import InputError

LONGEST_ROW = 1 << 24  # bytes of a row: a longer one is a mistake, and is not read into memory
ARRAY_BLOCK = 1 << 20  # characters of a JSON array that are read at once
BETWEEN_ROWS = re.compile(r"[\s,]*")
WANTED = ('{"question": …, "answer": …} or {"messages": [{"role": "user", "content": …}, '
          '{"role": "assistant", "content": …}, …]}, one JSON object a line')
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


# ---- The forms of a row ----

def from_question(row):
    """{"question": …, "answer": …}"""
    return [(row["question"], row["answer"])]


def from_messages(row):
    """{"messages": [message, …]}"""
    return pair_messages(row["messages"], "messages")


def from_conversations(row):
    """{"conversations": [message, …]}"""
    return pair_messages(row["conversations"], "conversations")


def from_instruction(row):
    """{"instruction": …, "input": …, "output": …}; "input" and "system" may be missing or empty."""
    question = join_texts(row["instruction"], row.get("input"))
    return [(with_system(row.get("system"), question), row["output"])]


def from_prompt(row):
    """{"prompt": …, "response": …}"""
    return [(row["prompt"], row["response"])]


def from_completion(row):
    """{"prompt": …, "completion": …}"""
    return [(row["prompt"], row["completion"])]


# The keys that a form needs, and the function from such a row to its turns. The first that fits is used.
ROW_FORMS = {
    ("messages",): from_messages,
    ("conversations",): from_conversations,
    ("question", "answer"): from_question,
    ("instruction", "output"): from_instruction,
    ("prompt", "response"): from_prompt,
    ("prompt", "completion"): from_completion,
}

KNOWN_KEYS = ", or ".join(" and ".join(f'"{key}"' for key in keys) for keys in ROW_FORMS)


def form_of(row):
    """The keys of the form that a row has, one of ROW_FORMS; None if it has none of them."""
    if not isinstance(row, dict):
        return None
    return next((keys for keys in ROW_FORMS if all(key in row for key in keys)), None)


def join_texts(instruction, more):
    """An instruction and its input with a line break between them, or the only one that is not blank."""
    for text in (instruction, more):
        if text is not None and not isinstance(text, str):
            raise ValueError("the question is not a string")
    return "\n".join(text for text in (instruction, more) if text and text.strip())


def with_system(system, question):
    """The first question with the system message, if there is one, in front of it."""
    if system is not None and not isinstance(system, str):
        raise ValueError("the system message is not a string")
    is_blank = not isinstance(question, str) or not question.strip()
    return question if is_blank else join_texts(system, question)


def pair_messages(messages, key):
    """[user message, assistant message, …] -> [(question, answer), …]

    A system message at the beginning is put in front of the first question."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key} is not a list of messages")
    roles = []
    contents = []
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from")) if isinstance(message, dict) else None
        role = ROLES.get(role.lower()) if isinstance(role, str) else None
        if role == "system" and number == 1:
            wanted = "system"
        else:
            wanted = "user" if not roles or roles[-1] != "user" else "assistant"
        if role != wanted:
            raise ValueError(f'message {number} does not have the role "{wanted}"')
        if "content" not in message and "value" not in message:
            raise ValueError(f"message {number} has no content")
        roles.append(role)
        contents.append(message.get("content", message.get("value")))
    if roles[-1] != "assistant":
        raise ValueError("the last message is not the assistant's")
    if roles[0] == "system":
        system = contents.pop(0)
        contents[0] = with_system(system, contents[0])
    return list(zip(contents[::2], contents[1::2], strict=True))


def turns_of(row):
    """The turns of a row, a list of (question, answer). Raises ValueError saying what is wrong with it."""
    if isinstance(row, list) and row and isinstance(row[0], dict):  # the messages without a name
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    form = form_of(row)
    if form is None:
        begun = next((keys for keys in ROW_FORMS if any(key in row for key in keys)), None)
        if begun is None:
            raise ValueError(f"not a row of a known form, which has the keys {KNOWN_KEYS}")
        missing = next(key for key in begun if key not in row)
        raise ValueError(f'the key "{missing}" is missing')
    turns = ROW_FORMS[form](row)
    for turn in turns:
        for name, text in zip(("question", "answer"), turn, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"the {name} is not a string")
            if not text.strip():
                raise ValueError(f"the {name} is empty")
    return turns


def parse_row(line):
    """The turns of a JSONL line, bytes, in any form of ROW_FORMS: a list of (question, answer).

    Raises ValueError saying what is wrong with it."""
    return turns_of(load_json(line))


def load_json(line):
    """The value of a JSONL line, bytes. Raises ValueError saying what is wrong with it."""
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise ValueError("holds a number of too many digits") from None


# ---- Reading rows from a file ----

def read_rows(path, name, bar, complain):
    """Yield (place, row) for every row of a JSONL file or a JSON array in UTF-8.

    row: the parsed JSON. place: "line 3", or "row 2, line 7" in an array, for messages after `name`.
    bar: a progress bar over the bytes. Rows that are not JSON go to `complain(place, reason)`; in an array
    the next row cannot be found then, so that is an InputError."""
    if is_array(path):
        yield from read_array(path, name, bar)
        return
    for place, line in read_lines(path, bar, complain):
        try:
            row = load_json(line)
        except ValueError as error:
            complain(place, str(error))
        else:
            yield place, row


def is_array(path):
    """Whether a file is one JSON array, and not JSONL."""
    with open(path, "rb") as file:
        line = file.readline(LONGEST_ROW).removeprefix(codecs.BOM_UTF8)
        while line.isspace():
            line = file.readline(LONGEST_ROW)
        if not line.lstrip().startswith(b"["):
            return False
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return True  # its first line alone is no JSON: an array of many lines
        return not file.read(1 << 16).strip()  # more rows follow: JSONL, whose first row is a list


def read_lines(path, bar, complain):
    """Yield (place, line) for every line, bytes, that is not blank; too long ones go to `complain`."""
    number = 0
    with open(path, "rb") as file:
        while line := file.readline(LONGEST_ROW):
            number += 1
            bar.update(len(line))
            if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):  # skip the rest of the line
                    line = file.readline(LONGEST_ROW)
                    bar.update(len(line))
                complain(f"line {number}", f"longer than {LONGEST_ROW >> 20} MB")
                continue
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield f"line {number}", line


def read_array(path, name, bar):
    """Yield (place, row) for every row of a JSON array, of which no more is in memory than one row needs."""
    decoder = json.JSONDecoder()
    number = 0
    line = 1
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read(ARRAY_BLOCK)
            position = text.index("[") + 1
            line += text.count("\n", 0, position)
            while True:
                start = BETWEEN_ROWS.match(text, position).end()
                line += text.count("\n", position, start)
                position = start
                if text[position:position + 1] == "]":
                    break
                try:
                    row, end = decoder.raw_decode(text, position)
                except json.JSONDecodeError as error:
                    more = file.read(ARRAY_BLOCK) if len(text) - position < LONGEST_ROW else ""
                    if not more:
                        line += text.count("\n", position, error.pos)
                        raise InputError(f"{name}, line {line}: not valid JSON ({error.msg}); mend it, or "
                                         "give JSONL, whose bad lines are skipped") from None
                    bar.update(len(more))
                    text = text[position:] + more
                    position = 0
                    continue
                number += 1
                yield f"row {number}, line {line}", row
                line += text.count("\n", position, end)
                position = end
            if text[position + 1:].strip() or file.read(ARRAY_BLOCK).strip():
                raise InputError(f"{name}, line {line}: more text after the end of the JSON array")
    except UnicodeDecodeError:
        raise InputError(f"{name}, after line {line}: not UTF-8; give its encoding with --encoding") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
        raise InputError(f"{name}, line {line}: not valid JSON ({reason})") from None
