// Asking one or several models at once, and their answers side by side as they come.

import { stream } from "./api.js";
import { announce, byId, counted, make, note, say } from "./dom.js";

const MOST_AT_ONCE = 5; // a browser keeps six connections to a server, and the load needs one
const MOST_CHIPS = 24;
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const REASONS = { stop: "complete", length: "token limit reached" };

export function startPlayground({ refused, answered }) {
  const chosen = new Set();
  const extra = new Set(); // typed by hand: versions, mixes, names beyond the chips
  const histories = new Map(); // model -> the turns that it has seen
  let base = null;
  let adapters = [];
  let running = null; // the AbortController of the answers that are being written

  // ---- who answers
  function show(name, entries) {
    if (base !== name) {
      if (base !== null) chosen.delete(base);
      base = name;
      if (!chosen.size) chosen.add(name);
    }
    adapters = entries;
    const known = new Set([base, ...entries.map((entry) => entry.id)]);
    for (const model of [...chosen]) {
      if (!known.has(model) && !extra.has(model)) chosen.delete(model);
    }
    chips();
  }

  function chips() {
    const named = adapters.map((entry) => entry.id);
    const visible = [base, ...named.slice(0, MOST_CHIPS)];
    const models = [...new Set([...visible, ...named.filter((name) => chosen.has(name)), ...extra])];
    const signature = JSON.stringify(models);
    if (byId("chips").dataset.models !== signature) {
      const focused = document.activeElement?.dataset?.model;
      byId("chips").dataset.models = signature;
      byId("chips").replaceChildren(...models.map(chip));
      if (focused) byId("chips").querySelector(`[data-model=${CSS.escape(focused)}]`)?.focus();
      byId("other-names").replaceChildren(...named.slice(0, 1000).map((name) => make("option", { value: name })));
    }
    for (const box of byId("chips").querySelectorAll("input")) box.checked = chosen.has(box.dataset.model);
  }

  function chip(model) {
    const box = make("input", { type: "checkbox", "data-model": model });
    box.addEventListener("change", () => {
      if (box.checked) choose(model);
      else chosen.delete(model);
      box.checked = chosen.has(model);
    });
    return make("label", { class: "chip", title: model }, box, make("span", {}, model === base ? `${model} (base)` : model));
  }

  function choose(model) {
    const full = chosen.size >= MOST_AT_ONCE && !chosen.has(model);
    note(byId("ask-note"), full ? `Up to ${MOST_AT_ONCE} can answer at a time.` : "", { problem: full });
    if (!full) chosen.add(model);
    return !full;
  }

  function addOther() {
    const model = byId("other").value.trim();
    if (!model || !choose(model)) return;
    if (model !== base && !adapters.some((entry) => entry.id === model)) extra.add(model);
    byId("other").value = "";
    chips();
  }

  // ---- what is asked
  function settings() {
    const asked = {};
    for (const name of NUMBERS) {
      const text = byId(name).value.trim();
      // What is no number goes to the server as it is: its message says what it takes.
      if (text) asked[name] = Number.isNaN(Number(text)) ? text : Number(text);
    }
    if (byId("stop-text").value) asked.stop = byId("stop-text").value;
    return asked;
  }

  function brief() {
    const told = Object.entries(settings()).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    if (byId("mode").value === "text") told.unshift("plain text");
    else if (byId("system").value.trim()) told.unshift("with a system prompt");
    say(byId("settings-brief"), told.join(", "));
    byId("system").disabled = byId("onward").disabled = byId("mode").value === "text";
  }

  function question(model, text) {
    const body = { model, stream: true, stream_options: { include_usage: true }, ...settings() };
    if (byId("mode").value === "text") return ["v1/completions", { ...body, prompt: text }];
    const system = byId("system").value.trim();
    const earlier = byId("onward").checked ? (histories.get(model) ?? []) : [];
    const messages = [...earlier, { role: "user", content: text }];
    if (system) messages.unshift({ role: "system", content: system });
    return ["v1/chat/completions", { ...body, messages }];
  }

  // ---- asking
  async function ask() {
    const text = byId("prompt").value;
    if (running) return;
    if (!chosen.size) return note(byId("ask-note"), "Choose who answers.", { problem: true });
    if (!text.trim()) {
      note(byId("ask-note"), "Write a message first.", { problem: true });
      return byId("prompt").focus();
    }
    note(byId("ask-note"), "");
    running = new AbortController();
    busy(true);
    const models = [...chosen];
    const cards = models.map((model) => card(model));
    const turn = make(
      "section",
      { class: "turn" },
      make("p", { class: "question" }, make("span", { class: "unseen" }, "You: "), text),
      make("div", { class: "answers" }, ...cards.map((one) => one.element)),
    );
    byId("turns").prepend(turn);
    announce(`Asked ${models.join(", ")}.`);
    const chat = byId("mode").value === "chat";
    const outcomes = await Promise.all(cards.map((one) => answer(one, ...question(one.model, text), running.signal)));
    outcomes.forEach((said, i) => {
      if (!chat || !said) return;
      const history = histories.get(models[i]) ?? [];
      histories.set(models[i], [...history, { role: "user", content: text }, { role: "assistant", content: said }]);
    });
    running = null;
    busy(false);
    answered();
  }

  function busy(is) {
    byId("send").disabled = is;
    byId("stop").disabled = !is;
    byId("clear").disabled = is || !byId("turns").childElementCount;
    if (is && document.activeElement === document.body) byId("stop").focus();
    if (!is && document.activeElement === document.body) byId("prompt").focus();
  }

  function stop() {
    running?.abort();
  }

  function clear() {
    histories.clear();
    byId("turns").replaceChildren();
    busy(false);
    byId("prompt").focus();
  }

  // ---- one answer
  function card(model) {
    const version = make("span", { class: "soft small" });
    const text = make("p", { class: "text" }, "");
    const facts = make("p", { class: "facts soft small" }, "waiting …");
    const title = make("header", { class: "title-row" }, make("h3", { class: "name", title: model }, model), version);
    const element = make("article", { class: "answer", "aria-busy": "true", "aria-label": `Answer of ${model}` }, title, text, facts);
    text.append(document.createTextNode(""));
    return { model, element, version, text: text.lastChild, facts };
  }

  /** Writes an answer into its card; gives its text, or null where there is nothing to go on with. */
  async function answer(one, path, body, signal) {
    const began = performance.now();
    let first = null;
    let usage = null;
    let reason = null;
    const ended = (facts, problem = false) => {
      one.element.setAttribute("aria-busy", "false");
      note(one.facts, facts, { problem });
      announce(`${one.model}: ${facts}`);
    };
    try {
      const opened = (headers) => {
        const version = headers.get("X-Adapter-Version");
        const own = version?.startsWith(`${one.model}@`);
        if (version && version !== one.model) say(one.version, own ? `version ${version.slice(one.model.length + 1)}` : version);
        say(one.facts, "writing …");
      };
      for await (const event of stream(path, body, signal, opened)) {
        usage = event.usage ?? usage;
        const choice = event.choices[0];
        const piece = choice?.delta ? choice.delta.content : choice?.text;
        if (piece) {
          first ??= performance.now();
          one.text.appendData(piece);
        }
        reason = choice?.finish_reason ?? reason;
      }
      ended(facts(usage, reason, began, first));
    } catch (error) {
      if (error.name === "AbortError") {
        ended("stopped");
      } else {
        ended(error.message, true);
        refused(error);
        return null;
      }
    }
    return one.text.data || null;
  }

  // ---- the keyboard and the buttons
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", stop);
  byId("clear").addEventListener("click", clear);
  byId("add-other").addEventListener("click", addOther);
  byId("other").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // it would send the message
    addOther();
  });
  byId("settings").addEventListener("input", brief);
  for (const name of [...NUMBERS, "stop-text"]) {
    byId(name).addEventListener("keydown", (event) => event.key === "Enter" && !event.ctrlKey && event.preventDefault());
  }
  byId("playground").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    ask();
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && running && stop());
  brief(); // a browser may have kept what was filled in
  return { show };
}

function facts(usage, reason, began, first) {
  const told = [REASONS[reason] ?? reason ?? "complete"];
  if (usage) told.push(counted(usage.completion_tokens, "token"));
  if (first !== null) {
    told.push(`first after ${seconds(first - began)}`);
    const growing = performance.now() - first;
    if (usage?.completion_tokens > 1 && growing > 0) {
      told.push(`${((1000 * (usage.completion_tokens - 1)) / growing).toFixed(0)} tokens/s`);
    }
  }
  return told.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

const seconds = (milliseconds) =>
  milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
