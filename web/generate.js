// From logits to tokens: generate.py in JavaScript, and the loop that a Worker runs.
"use strict";

const N_CANDIDATES = 10;
const MAX_UNREAD = 256;  // tokens that are computed ahead of what the page shows

/** Lower the logits of the tokens in `seen`, whatever their sign; returns a copy. */
function penalizeRepetition(logits, seen, penalty) {
  const result = Float64Array.from(logits);
  if (penalty === 1) return result;
  for (const id of new Set(seen)) result[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  return result;
}

/** Probabilities (V) from logits (V). topK 0 and topP 1 are off; temperature must be above 0. */
function logitsToProbs(logits, temperature, topK, topP) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  let smallest = -Infinity;
  if (topK && topK < logits.length) smallest = Float64Array.from(logits).sort()[logits.length - topK];
  const probs = logits.map(x => x < smallest ? 0 : Math.exp((x - largest) / Math.max(temperature, 1e-38)));
  normalize(probs);
  if (topP < 1) {
    const order = Array.from(probs.keys()).sort((a, b) => probs[b] - probs[a]);
    let before = 0;
    for (const id of order) {
      const p = probs[id];
      if (before >= topP) probs[id] = 0;  // the token that crosses topP stays
      before += p;
    }
    normalize(probs);
  }
  return probs;
}

function normalize(probs) {
  const total = probs.reduce((a, b) => a + b);
  for (let i = 0; i < probs.length; i++) probs[i] /= total;
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** An index drawn with probabilities `probs`; random: a number in [0, 1). */
function draw(probs, random) {
  let last = 0;
  for (let i = 0; i < probs.length; i++) {
    if (probs[i] > 0) last = i;
    random -= probs[i];
    if (random < 0) return i;
  }
  return last;  // the sum fell short of 1 by a rounding error
}

/** The ids of the n largest values, largest first. */
function largest(values, n) {
  const best = [];
  for (let id = 0; id < values.length; id++) {
    if (best.length === n && !(values[id] > values[best[n - 1]])) continue;
    let at = best.length;
    while (at > 0 && values[id] > values[best[at - 1]]) at--;
    best.splice(at, 0, id);
    if (best.length > n) best.pop();
  }
  return best;
}

/** Draw a token: {id, candidates}.
 *
 *  candidates: [id, the model's probability, the draw's] of the likeliest ten, and of the drawn one if it is
 *  not among them. */
function sample(logits, seen, settings, random) {
  const model = logitsToProbs(logits, 1, 0, 1);
  const scores = penalizeRepetition(logits, seen, settings.penalty);
  const best = argmax(scores);
  let drawn = scores.map((_, id) => id === best ? 1 : 0);
  if (settings.temperature > 0) {
    drawn = logitsToProbs(scores, settings.temperature, settings.topK, settings.topP);
  }
  const id = settings.temperature > 0 ? draw(drawn, random()) : best;
  const shown = largest(scores, N_CANDIDATES);
  if (!shown.includes(id)) shown.push(id);
  return {id, candidates: shown.map(i => [i, model[i], drawn[i]])};
}

/** The end of `ids` that fits into a prompt's room; under the template the first mark stays in front. */
function fitPrompt(ids, length, blockSize, keepFirst) {
  const room = Math.max(1, Math.min(length - 1, blockSize - Math.floor(blockSize / 4)));
  if (ids.length <= room) return ids;
  return [...ids.slice(0, keepFirst), ...ids.slice(ids.length - room + keepFirst)];
}

/** Yield null after each token of the prompt, then {id, candidates} for each token of the continuation.
 *
 *  request: {ids, length, penaltyStart, stopId, temperature, topK, topP, penalty}; length: that of the prompt
 *  and the continuation together.
 *  When the context is full, its second half is read again and generation continues from there. */
function* generate(model, request, random = Math.random) {
  const blockSize = model.config.block_size;
  let ids = Array.from(request.ids);
  let penaltyStart = request.penaltyStart;
  const steps = request.length - ids.length;
  for (let n = 0; n < steps; n++) {
    if (n && model.ids.length === blockSize) {
      const dropped = ids.length - (Math.floor(blockSize / 2) || 1);
      ids = ids.slice(dropped);
      penaltyStart = Math.max(0, penaltyStart - dropped);
    }
    let logits = null;
    model.rewind(ids);
    while (model.ids.length < ids.length) {
      const isLast = model.ids.length === ids.length - 1;
      logits = model.read(ids[model.ids.length], isLast);
      if (!isLast) yield null;
    }
    const next = sample(logits, ids.slice(penaltyStart), request, random);
    yield next;
    if (next.id === request.stopId) return;
    ids.push(next.id);
  }
}

/** Answer messages; the same in a Worker and on the main thread.
 *
 *  In: {type: "load", file, buffer}, {type: "generate", request}, {type: "stop"}, and {type: "read"} when the
 *  page has shown "tokens" and can show more.
 *  Out: {type: "ready"}, {type: "tokens", tokens}, {type: "done", seconds, reason}, {type: "error", text}.
 *  sliceMs: how long to compute before looking for messages. */
function serve(post, sliceMs, Model) {
  let model = null;
  let stopped = false;
  let isRead = true;  // has the page shown the tokens sent to it?
  let wake = () => {};
  const channel = new MessageChannel();  // without the 4 ms that setTimeout waits
  let resume = null;
  channel.port1.onmessage = () => resume();
  const pause = () => new Promise(resolve => {
    resume = resolve;
    channel.port2.postMessage(null);
  });

  function send(tokens) {
    if (!tokens.length) return;
    isRead = false;
    post({type: "tokens", tokens});
  }

  async function run(request) {
    stopped = false;
    isRead = true;
    const start = performance.now();
    let answerStart = start;  // when the prompt is read
    let hasBegun = false;
    let reason = "length";
    let tokens = [];
    let sliceEnd = start + sliceMs;
    for (const next of generate(model, request)) {
      if (next !== null) {
        hasBegun = true;
        tokens.push(next);
        if (next.id === request.stopId) reason = "end";
      } else if (!hasBegun) {
        answerStart = performance.now();
      }
      if (performance.now() < sliceEnd) continue;
      if (isRead) {
        send(tokens);
        tokens = [];
      }
      await pause();
      // A fast model waits for the page, which could not react to a press of Stop otherwise.
      while (tokens.length >= MAX_UNREAD && !isRead && !stopped) await new Promise(resolve => wake = resolve);
      if (stopped) {
        reason = "stopped";
        break;
      }
      sliceEnd = performance.now() + sliceMs;
    }
    send(tokens);
    post({type: "done", reason, seconds: (performance.now() - answerStart) / 1000});
  }

  return message => {
    const fail = error => post({type: "error", text: String(error && error.message || error)});
    try {
      if (message.type === "load") {
        model = new Model(message.file, message.buffer);
        post({type: "ready"});
      } else if (message.type === "generate") {
        run(message.request).catch(fail);
      } else {
        if (message.type === "read") isRead = true;
        else stopped = true;
        wake();
      }
    } catch (error) {
      fail(error);
    }
  };
}
