// The page: conversation, settings, candidates. Text of the model reaches the page through textContent only.
"use strict";

let language = stored("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let theme = stored("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
let mode = CARD.chat ? "chat" : "continue";
let send = null;  // to the engine; null until the model is loaded
let current = null;  // the entry that is being written
let waiting = null;  // what was asked before the model was loaded
const SHARE = 4;  // how many times as long the engine may compute as the page takes to show
const entries = {chat: [], continue: []};
const words = () => WORDS[language];

// ---- interface --------------------------------------------------------------------------------------------

function translate() {
  const w = words();
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of findAll("[data-text]")) element.textContent = w[element.dataset.text];
  for (const element of findAll("[data-label]")) {
    element.setAttribute("aria-label", w[element.dataset.label]);
    if (element.matches("button")) element.title = w[element.dataset.label];
  }
  $("language").textContent = w.other;
  $("card").replaceChildren(...w.card(CARD).filter(Boolean).map(part => make("span", "", part)));
  const examples = w.examples.filter(text => !tokenizer.encode(text).includes(tokenizer.unknown_id));
  $("examples").replaceChildren(...examples.map(text => {
    const button = make("button", "example", text);
    button.type = "button";
    button.onclick = () => ask(text);
    return button;
  }));
  for (const entry of [...entries.chat, ...entries.continue]) describe(entry);
  showMode();
  if (inspected) inspect(inspected);
}

function showMode() {
  const w = words();
  const isChat = mode === "chat";
  for (const button of findAll("[data-mode]")) {
    button.setAttribute("aria-pressed", button.dataset.mode === mode);
  }
  $("welcome").querySelector("h2").textContent = isChat ? w.welcome : w.welcomeContinue;
  $("welcome").querySelector("p").textContent = isChat ? w.welcomeText : w.welcomeContinueText;
  $("welcome").hidden = entries[mode].length > 0;
  $("examples").hidden = !isChat;
  $("input").placeholder = isChat ? w.ask : w.begin;
  $("input").setAttribute("aria-label", isChat ? w.ask : w.begin);
  $("thread").replaceChildren(...entries[mode].map(entry => entry.element));
  showBusy();
}

function showBusy() {
  const isBusy = current !== null;
  const label = words()[isBusy ? "stop" : "send"];
  $("send").setAttribute("aria-label", label);
  $("send").title = label;
  $("send").classList.toggle("stop", isBusy);
  $("send").querySelector("use").setAttribute("href", isBusy ? "#i-stop" : "#i-send");
  $("send").disabled = !isBusy && $("input").value.trim() === "" && mode === "chat";
  document.body.dataset.busy = isBusy;
}

function setMode(value) {
  if (current || value === mode) return;
  mode = value;
  closeSheets();
  showMode();
  scrollDown(true);
}

function setTheme(value) {
  theme = value;
  document.documentElement.dataset.theme = theme;
}

function scrollDown(always) {
  const box = $("scroller");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < 160) box.scrollTop = box.scrollHeight;
}

function fitInput() {
  $("input").style.height = "auto";
  $("input").style.height = `${Math.min($("input").scrollHeight, innerHeight * 0.35)}px`;
  showBusy();
}

// ---- conversation -----------------------------------------------------------------------------------------

function newEntry(prompt, kind) {
  const element = make("article", `entry ${kind}`);
  const asked = make("div", "asked", prompt);
  const answer = make("div", "answer");
  const meta = make("div", "meta");
  const note = make("span", "note");
  const buttons = ["copy", kind === "chat" ? "retry" : "more"].map(name => {
    const button = make("button", "plain");
    button.type = "button";
    button.dataset.text = name;
    button.dataset.action = name;
    button.textContent = words()[name];
    return button;
  });
  meta.append(note, ...buttons);
  if (kind === "chat") element.append(asked, answer, meta);
  else {  // one running text
    const text = make("div", "running");
    text.append(asked, answer);
    element.append(text, meta);
  }
  const entry = {prompt, kind, element, answer, note, text: "", n: 0, rate: 0, reason: "", trimmed: false};
  buttons[0].onclick = () => copy(entry, buttons[0]);
  buttons[1].onclick = () => kind === "chat" ? retry(entry) : ask(entry.prompt + entry.text);
  return entry;
}

function describe(entry) {
  const w = words();
  const parts = [entry.n ? w.speed(entry.n, entry.rate) : entry === current ? w.reading : ""];
  if (entry.reason === "stopped") parts.push(w.stopped);
  if (entry.reason === "length") parts.push(w.full);
  if (entry.trimmed) parts.push(w.trimmed);
  if (entry.error) parts.push(w.broken(entry.error));
  entry.note.textContent = parts.filter(Boolean).join(" · ");
  const answerButtons = entry.element.querySelectorAll("[data-action]");
  for (const button of answerButtons) button.textContent = w[button.dataset.action];
}

/** Answer a question, or continue a text. Before the model is loaded it waits. */
function ask(text) {
  if (current) return;
  if (!send) {
    waiting = text;
    return;
  }
  const turns = mode === "chat" ? entries.chat.map(entry => [entry.prompt, entry.text]) : [];
  let ids = tokenizer.encode(text);
  if (mode === "chat") ids = tokenizer.prompt(turns, text);
  else if (!ids.length) ids = [tokenizer.bos_id];
  const turnLength = mode === "chat" ? tokenizer.question(text).length : ids.length;
  const fitted = fitPrompt(ids, settings.length, BLOCK_SIZE, mode === "chat" ? 1 : 0);

  const entry = current = newEntry(text, mode);
  entry.trimmed = fitted.length < ids.length;
  entry.start = performance.now();
  entries[mode].push(entry);
  $("thread").append(entry.element);
  $("welcome").hidden = true;
  describe(entry);
  $("status").textContent = words().thinking;
  openSheet("");
  showBusy();
  scrollDown(true);
  send({type: "generate", request: {...settings, ids: fitted, stopId: tokenizer.eos_id,
    penaltyStart: Math.max(0, fitted.length - turnLength)}});
}

function retry(entry) {
  if (current) return;
  const at = entries.chat.indexOf(entry);
  for (const later of entries.chat.splice(at)) later.element.remove();
  ask(entry.prompt);
}

async function copy(entry, button) {
  const text = entry.kind === "chat" ? entry.text : entry.prompt + entry.text;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = words().copied;
    setTimeout(() => describe(entry), 1500);
  } catch {  // not allowed: select it, so that the person can copy it
    getSelection().selectAllChildren(entry.answer);
  }
}

function addToken(entry, token) {
  const span = make("span", "token");
  const isEnd = token.id === tokenizer.eos_id;
  if (isEnd) span.classList.add("end");  // its mark is drawn by the style sheet: it is not part of the text
  else span.textContent = tokenizer.decode(token.id);
  if (isEnd || !span.textContent.trim()) span.setAttribute("aria-label", tokenLabel(token.id));
  span.setAttribute("role", "button");
  span.tabIndex = entry.answer.childElementCount ? -1 : 0;
  span.token = token;
  const model = token.candidates.find(([id]) => id === token.id)[1];
  span.style.setProperty("--doubt", (1 - model).toFixed(3));
  entry.text += span.textContent;
  entry.n += 1;
  entry.answer.append(span);
}

function receive(message) {
  if (message.type === "ready") {
    document.body.dataset.ready = true;
    $("status").textContent = "";
    translate();
    if (waiting !== null) ask(waiting);
    waiting = null;
  } else if (message.type === "tokens") {
    const entry = current;
    entry.first = entry.first || performance.now();
    const start = performance.now();
    for (const token of message.tokens) addToken(entry, token);
    const seconds = (performance.now() - entry.first) / 1000;
    if (seconds > 0.3) entry.rate = Math.round(entry.n / seconds);
    describe(entry);
    scrollDown(false);  // makes the browser lay out the text, so that its cost is known
    // On one core the page and the engine share it: a long answer, slow to lay out, is shown in larger steps.
    setTimeout(() => send({type: "read"}), SHARE * (performance.now() - start));
  } else if (message.type === "done") {
    const entry = current;
    current = null;
    entry.rate = entry.n > 1 ? Math.round(entry.n / message.seconds) : 0;
    entry.reason = message.reason;
    entry.done = true;
    describe(entry);
    showBusy();
    $("status").textContent = entry.text;
    scrollDown(false);
  } else {
    const entry = current;
    current = null;
    if (entry) {
      entry.error = message.text;
      describe(entry);
    } else {
      $("card").textContent = words().failed(message.text);
    }
    showBusy();
  }
}

// ---- start ------------------------------------------------------------------------------------------------

/** The bytes of the weights, whose Base64 text is taken out of the page piece by piece. */
async function readWeights() {
  const bytes = new Uint8Array(FILE.bytes);
  let at = 0;
  for (const element of findAll("script.weights")) {
    const text = element.textContent;
    element.remove();
    const binary = atob(text);
    for (let i = 0; i < binary.length; i++) bytes[at + i] = binary.charCodeAt(i);
    at += binary.length;
    $("status").textContent = words().loading;
    $("card").textContent = `${words().loading} ${Math.round(100 * at / FILE.bytes)} %`;
    await new Promise(resolve => setTimeout(resolve));  // so that the page stays responsive
  }
  if (at !== FILE.bytes) throw new Error(`${at} of ${FILE.bytes} bytes`);
  return bytes.buffer;
}

/** Start the engine in a Worker, or on this page where none starts; returns what sends messages to it. */
function startEngine() {
  const onThisPage = () => serve(receive, 12, Engine.Model);
  const start = "const answer = serve(message => postMessage(message), 40, Engine.Model);"
    + "onmessage = event => answer(event.data); postMessage({type: 'started'});";
  const source = new Blob([$("engine").textContent, start], {type: "text/javascript"});
  return new Promise(resolve => {
    let worker;
    try {
      worker = new Worker(URL.createObjectURL(source));
    } catch {
      resolve(onThisPage());
      return;
    }
    worker.onerror = () => resolve(onThisPage());
    worker.onmessage = () => {  // it has started, so the weights may be handed over
      worker.onmessage = event => receive(event.data);
      worker.onerror = event => receive({type: "error", text: event.message || "Worker"});
      resolve((message, transfer) => worker.postMessage(message, transfer || []));
    };
  });
}

/** #q=…&t=0&r=1: settings, and a question to ask at once. A plus sign stays one. */
function followLink() {
  const values = {};
  for (const part of location.hash.slice(1).split("&")) {
    const [name, text] = [part.split("=", 1)[0], part.slice(part.indexOf("=") + 1)];
    try {
      values[name] = decodeURIComponent(text);
    } catch {
      values[name] = text;
    }
  }
  for (const field of FIELDS) if (values[field.link] !== undefined) setField(field, values[field.link]);
  if (values.mode === "chat" || values.mode === "continue") setMode(values.mode);
  if (values.q) ask(values.q);
}

function listen() {
  $("form").onsubmit = event => {
    event.preventDefault();
    if (current) {
      send({type: "stop"});
      return;
    }
    const text = mode === "chat" ? $("input").value.trim() : $("input").value;
    if (mode === "chat" && !text) return;
    $("input").value = "";
    fitInput();
    ask(text);
  };
  $("input").oninput = fitInput;
  $("input").onkeydown = event => {
    // On a touch screen Enter begins a line: there the button is as near.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch()) return;
    event.preventDefault();
    if (!current) $("form").requestSubmit();
  };
  for (const button of findAll("[data-mode]")) button.onclick = () => setMode(button.dataset.mode);
  for (const button of findAll(".close")) button.onclick = closeSheets;
  $("new").onclick = () => {
    if (current) return;
    entries[mode] = [];
    closeSheets();
    showMode();
    $("input").focus();
  };
  $("open-settings").onclick = () => $("settings").hidden ? openSheet("settings") : closeSheets();
  $("defaults").onclick = () => FIELDS.forEach(field => setField(field, field.value));
  $("language").onclick = () => {
    language = language === "zh" ? "en" : "zh";
    stored("language", language);
    translate();
  };
  $("theme").onclick = () => {
    setTheme(theme === "dark" ? "light" : "dark");
    stored("theme", theme);
  };
  $("thread").onclick = event => {
    const span = event.target.closest(".token");
    if (!span || String(getSelection())) return;
    span.focus({preventScroll: true});
    inspect(span);
  };
  $("thread").onkeydown = event => {
    const span = event.target.closest(".token");
    if (!span) return;
    if (event.key === "Enter" || event.key === " ") inspect(span);
    else if (!moveFrom(span, event.key)) return;
    event.preventDefault();
  };
  document.onkeydown = event => {
    if (event.key === "Escape") closeSheets();
  };
  addEventListener("hashchange", followLink);
}

async function loadModel() {
  try {
    const buffer = await readWeights();
    send = await startEngine();
    send({type: "load", file: {config: FILE.config, tensors: FILE.tensors}, buffer}, [buffer]);
  } catch (error) {
    receive({type: "error", text: error.message});
  }
}

setTheme(theme);
buildFields();
listen();
translate();
followLink();
if (!isTouch()) $("input").focus();
document.addEventListener("DOMContentLoaded", loadModel);  // the weights stand at the end of the page
