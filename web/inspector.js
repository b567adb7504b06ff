// The candidates of a token: which ten it was chosen from.
"use strict";

let inspected = null;  // the token's element

const NAMES = {"\n": "↵", " ": "␣", "\t": "⇥", "\u3000": "␣"};

function tokenLabel(id) {
  if (id === tokenizer.eos_id) return words().end;
  const text = tokenizer.decode(id);
  return NAMES[text] || text;
}

function openSheet(name) {
  for (const sheet of findAll(".sheet")) sheet.hidden = sheet.id !== name;
  document.body.dataset.sheet = name || "";
  $("open-settings").setAttribute("aria-expanded", name === "settings");
  if (name !== "inspector" && inspected) {
    inspected.classList.remove("selected");
    inspected = null;
  }
}

function closeSheets() {
  const back = inspected || (!$("settings").hidden && $("open-settings"));
  openSheet("");
  if (back) back.focus({preventScroll: true});
}

function percent(p) {
  if (p === 0) return "–";
  return p < 0.001 ? "< 0.1 %" : `${(100 * p).toFixed(p >= 0.9995 ? 0 : 1)} %`;
}

function inspect(span) {
  if (inspected) inspected.classList.remove("selected");
  openSheet("inspector");
  inspected = span;
  span.classList.add("selected");
  for (const other of span.parentElement.querySelectorAll('[tabindex="0"]')) other.tabIndex = -1;
  span.tabIndex = 0;
  const {id, candidates} = span.token;
  const rank = candidates.findIndex(([other]) => other === id);
  // A drawn token that is not among the ten is appended as the eleventh.
  $("chosen").textContent = words().chosen(tokenLabel(id), percent(candidates[rank][2]),
    rank < 10 ? rank + 1 : "> 10");
  $("rows").replaceChildren(...candidates.map(([other, model, drawn]) => {
    const row = make("tr", other === id ? "chosen" : "");
    if (!drawn) row.classList.add("out");
    if (other === id) row.setAttribute("aria-current", "true");
    const label = make("th", "", tokenLabel(other));
    label.scope = "row";
    if (tokenizer.isSpecial.has(other)) label.classList.add("special");
    const bar = make("td", "bar");
    bar.setAttribute("aria-hidden", "true");
    for (const [name, p] of [["of-model", model], ["of-draw", drawn]]) {
      const line = make("i", name);
      line.style.width = `${100 * p}%`;
      bar.append(line);
    }
    row.append(label, bar, make("td", "number", percent(model)), make("td", "number", percent(drawn)));
    return row;
  }));
  // On a phone the panel covers the lower part: the token goes above it.
  if (matchMedia("(max-width: 900px)").matches) {
    $("scroller").scrollTop += span.getBoundingClientRect().top - innerHeight * 0.2;
  }
}

function moveFrom(span, key) {
  const all = Array.from(span.parentElement.querySelectorAll(".token"));
  const at = all.indexOf(span);
  const next = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1}[key];
  if (next === undefined || !all[next]) return false;
  all.forEach(token => token.tabIndex = -1);
  all[next].tabIndex = 0;
  all[next].focus();
  if (inspected) inspect(all[next]);
  return true;
}
