// The settings of the sampler, and their panel.
"use strict";

// key, its name in a link, default (inference.py's), slider (from, to, step), limits of what may be typed
const FIELDS = [
  {key: "temperature", link: "t", value: 1, slider: [0, 2, 0.05], least: 0, most: 1000},
  {key: "topK", link: "k", value: 5, slider: [0, 50, 1], least: 0, most: 1e6, whole: true},
  {key: "topP", link: "p", value: 1, slider: [0.05, 1, 0.05], least: 0.001, most: 1},
  {key: "penalty", link: "r", value: 1.2, slider: [1, 2, 0.05], least: 0.01, most: 1000},
  {key: "length", link: "l", value: BLOCK_SIZE, slider: [2, 4 * BLOCK_SIZE, 1], least: 2, most: 1e6,
    whole: true},
];
const settings = Object.fromEntries(FIELDS.map(field => [field.key, field.value]));

function buildFields() {
  $("fields").replaceChildren(...FIELDS.map(field => {
    const row = make("div", "field");
    const label = make("label");
    label.dataset.text = field.key;
    label.htmlFor = `value-${field.key}`;
    const number = make("input");
    Object.assign(number, {id: `value-${field.key}`, type: "number", inputMode: "decimal", step: "any"});
    const slider = make("input");
    const [min, max, step] = field.slider;
    Object.assign(slider, {type: "range", min, max, step});
    slider.dataset.label = field.key;
    const help = make("p", "hint");
    help.dataset.text = `${field.key}Help`;
    help.id = `help-${field.key}`;
    number.setAttribute("aria-describedby", help.id);
    field.show = () => {
      number.value = settings[field.key];
      slider.value = settings[field.key];
    };
    slider.oninput = () => setField(field, slider.value);
    number.onchange = () => setField(field, number.value);
    row.append(label, number, slider, help);
    return row;
  }));
  FIELDS.forEach(field => field.show());
}

/** Take over a value that a person or a link gave, if it is one. */
function setField(field, text) {
  const value = Number(text);
  if (String(text).trim() !== "" && Number.isFinite(value)) {
    const limited = Math.min(field.most, Math.max(field.least, value));
    settings[field.key] = field.whole ? Math.round(limited) : limited;
  }
  field.show();
}
