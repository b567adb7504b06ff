// Text to token ids and back: tokenizer.py in JavaScript.
"use strict";

class Tokenizer {
  /** file: {itos, special, unknown_id, bos_id, eos_id, instruct_id, response_id}; special: a list of ids. */
  constructor(file) {
    Object.assign(this, file);
    this.isSpecial = new Set(file.special);
    this.stoi = new Map(file.itos.map((token, id) => [token, id]));
    this.wordLengths = new Map();  // first character -> lengths of its words, longest first
    file.itos.forEach((token, id) => {
      const characters = Array.from(token);
      if (characters.length < 2 || this.isSpecial.has(id)) return;
      const lengths = this.wordLengths.get(characters[0]) || [];
      if (!lengths.includes(characters.length)) lengths.push(characters.length);
      this.wordLengths.set(characters[0], lengths.sort((a, b) => b - a));
    });
  }

  /** Token ids of a text. Nothing that a person types becomes a special token. */
  encode(text) {
    const characters = Array.from(text);  // code points, as in Python
    const ids = [];
    for (let start = 0; start < characters.length;) {
      let id;
      let length;
      for (length of [...(this.wordLengths.get(characters[start]) || []), 1]) {
        id = this.stoi.get(characters.slice(start, start + length).join(""));
        if (id !== undefined && !this.isSpecial.has(id)) break;
      }
      ids.push(id === undefined ? this.unknown_id : id);
      start += length;
    }
    return ids;
  }

  /** The text of one id. A model may have more ids than the vocabulary has entries. */
  decode(id) {
    return id < this.itos.length ? this.itos[id] : "";
  }

  question(text) {
    return [this.instruct_id, ...this.encode(text), this.response_id];
  }

  /** What the model reads before it answers; turns: a list of [question, answer]. */
  prompt(turns, question) {
    const history = turns.flatMap(([q, a]) => [...this.question(q), ...this.encode(a), this.eos_id]);
    return [...history, ...this.question(question)];
  }
}
