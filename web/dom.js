// What the parts of the page share.
"use strict";

const $ = id => document.getElementById(id);
const findAll = selector => document.querySelectorAll(selector);
const FILE = JSON.parse($("model").textContent);
const CARD = FILE.card;
const tokenizer = new Tokenizer(FILE.tokenizer);
const BLOCK_SIZE = FILE.config.block_size;
const isTouch = () => matchMedia("(pointer: coarse)").matches;

/** A value that earlier visits left; private windows have no storage. */
function stored(key, value) {
  try {
    if (value !== undefined) localStorage.setItem(`nano-${key}`, value);
    return localStorage.getItem(`nano-${key}`);
  } catch {
    return null;
  }
}

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}
