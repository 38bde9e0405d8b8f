// What the server is doing right now, asked once a second while somebody looks.

import { ApiError, call } from "./api.js";
import { byId, counted, make, note, say } from "./dom.js";

const EVERY = 1000; // milliseconds
const SECONDS = 60; // in the picture
const MOST_ROWS = 4;

export function startLoad({ refused, reached, storeChanged }) {
  const rates = new Array(SECONDS).fill(0);
  let before = null; // the last count of tokens, and when it was read
  let seen = null; // the store's counters
  let run = 0; // each restart ends the rounds that were begun before it

  async function round(mine) {
    if (mine !== run) return;
    if (document.hidden) {
      before = null;
    } else {
      try {
        const state = await call("GET", "v1/state");
        if (mine !== run) return;
        if (!state.engine) throw new ApiError("No replica takes requests at this moment.");
        document.body.classList.remove("visitor");
        show(state);
      } catch (error) {
        if (mine !== run) return;
        // Without the right to see the state there is none to change it either.
        const visitor = error.status === 403;
        byId("load").hidden = visitor;
        document.body.classList.toggle("visitor", visitor);
        note(byId("load-note"), error.message, { problem: !visitor });
        if (error.status === 401 || visitor) {
          refused(error);
          return; // another answer comes with another key only
        }
        before = null;
        reached(error.message);
      }
    }
    setTimeout(round, EVERY, mine);
  }

  function show(state) {
    const { engine, adapters } = state;
    const now = performance.now();
    if (before !== null && now - before.at > EVERY / 4) {
      const rate = (1000 * Math.max(0, engine.generated_tokens - before.tokens)) / (now - before.at);
      rates.push(rate);
      rates.shift();
    }
    before = { tokens: engine.generated_tokens, at: now };
    byId("load").hidden = false;
    note(byId("load-note"), "");
    reached(state.draining ? "The server is about to stop" : state.alive ? null : "The engine is down");
    say(byId("rate"), String(Math.round(rates.at(-1))));
    draw(rates);
    say(byId("running"), String(engine.running));
    say(byId("waiting"), String(engine.waiting));
    say(byId("kv"), `${Math.ceil((100 * engine.kv_tokens) / engine.kv_capacity)} %`);
    const step = engine.last_step;
    say(
      byId("step"),
      engine.steps ? `${counted(step.decoded + step.prompt, "token")}, ${Math.round(1000 * step.seconds)} ms` : "–",
    );
    mix(engine.running_adapters, engine.waiting_adapters);
    // The adapters are read again only when something happened to one.
    const counters = JSON.stringify(adapters);
    if (seen !== null && seen !== counters) storeChanged();
    seen = counters;
  }

  return {
    restart() {
      run += 1;
      before = seen = null;
      round(run);
    },
    /** Without the right to see the state, an answer is what shows that something happened. */
    changed() {
      if (seen === null) storeChanged();
    },
  };
}

function draw(rates) {
  const peak = Math.max(...rates);
  const top = Math.max(peak, 1);
  const points = rates.map((rate, i) => `${((i * 60) / (rates.length - 1)).toFixed(2)},${(23 - (21 * rate) / top).toFixed(2)}`);
  const [area, line] = byId("spark").children;
  line.setAttribute("d", `M${points.join("L")}`);
  area.setAttribute("d", `M0,24L${points.join("L")}L60,24Z`);
  byId("spark").setAttribute("aria-label", `Tokens a second over the last minute: now ${Math.round(rates.at(-1))}, at most ${Math.round(peak)}`);
  say(byId("peak"), peak ? `most ${Math.round(peak)}` : "");
}

function mix(running, waiting) {
  const names = [...new Set([...Object.keys(running), ...Object.keys(waiting)])];
  const rows = names.map((name) => [name, running[name] ?? 0, waiting[name] ?? 0]);
  rows.sort((a, b) => b[1] + b[2] - (a[1] + a[2]) || a[0].localeCompare(b[0]));
  const most = Math.max(1, ...rows.map((row) => row[1] + row[2]));
  const room = rows.length > MOST_ROWS ? MOST_ROWS - 1 : MOST_ROWS; // the last line tells how many more there are
  const shown = rows.slice(0, room).map(([name, runs, waits]) => {
    const bar = make("span", { class: "bar", "aria-hidden": "true" }, make("i", { class: "runs" }), make("i", { class: "waits" }));
    bar.children[0].style.width = `${(100 * runs) / most}%`;
    bar.children[1].style.width = `${(100 * waits) / most}%`;
    const told = waits ? `${runs} + ${waits} waiting` : String(runs);
    return make("li", {}, make("span", { class: "name", title: name }, name), bar, make("span", { class: "soft small" }, told));
  });
  if (rows.length > room) shown.push(make("li", { class: "soft" }, `and ${rows.length - room} more`));
  if (!rows.length) shown.push(make("li", { class: "soft" }, "nothing"));
  byId("mix").replaceChildren(...shown);
}
