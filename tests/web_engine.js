// Runs the engine of a page in Node, for tests/test_web.py: node web_engine.js PAGE < request.json
"use strict";

const fs = require("fs");
const vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf8");
const scripts = [...page.matchAll(/<script(?: id="engine")?>([\s\S]*?)<\/script>/g)].map(found => found[1]);
const file = JSON.parse(page.match(/id="model">([\s\S]*?)<\/script>/)[1]);
const blocks = [...page.matchAll(/class="weights">(.*?)<\/script>/g)];
const request = JSON.parse(fs.readFileSync(0, "utf8"));

const context = vm.createContext(request.loops ? {performance} : {performance, WebAssembly});
if (request.loops) vm.runInContext("delete globalThis.WebAssembly", context);
const run = text => vm.runInContext(text, context);
run(scripts[0]);
run(scripts[1].slice(0, scripts[1].indexOf("// The words of the interface.")));  // the tokenizer
context.request = request;
context.file = file;
context.bytes = Array.from(Buffer.concat(blocks.map(found => Buffer.from(found[1], "base64"))));
if (Boolean(request.loops) === (run("makeKernel(1)") !== null)) throw new Error("other kernel");
run("const buffer = Uint8Array.from(bytes).buffer; const model = () => new Engine.Model(file, buffer);"
  + "const tokenizer = new Tokenizer(file.tokenizer);");

const actions = {
  logits: "(() => { const m = model(); return request.ids.map(id => Array.from(m.read(id, true))); })()",
  generate: "Array.from(generate(model(), request)).filter(Boolean).map(next => next.id)",
  turns: "(() => { const m = model(); return request.prompts.map(ids => "
    + "Array.from(generate(m, {...request, ids})).filter(Boolean).map(next => next.id)); })()",
  encode: "request.texts.map(text => tokenizer.encode(text))",
  prompt: "tokenizer.prompt(request.turns, request.question)",
  probs: "request.cases.map(c => Array.from(logitsToProbs(Float64Array.from(c.logits), ...c.settings)))",
  penalize: "Array.from(penalizeRepetition(Float64Array.from(request.logits), request.seen, "
    + "request.penalty))",
  draws: "request.randoms.map(random => draw(Float64Array.from(request.probs), random))",
  fit: "request.cases.map(c => fitPrompt(c.ids, c.length, c.block, c.keep))",
  candidates: "Array.from(generate(model(), request)).filter(Boolean).map(next => next.candidates)",
};
process.stdout.write(JSON.stringify(run(actions[request.action])));
