// The page as a whole: who is asked, with which key, and what the parts tell each other.

import { startAdapters } from "./adapters.js";
import { apiKey, call } from "./api.js";
import { byId, note, say } from "./dom.js";
import { startLoad } from "./load.js";
import { startPlayground } from "./playground.js";

const health = byId("health");
const PAUSE = 2000; // milliseconds between two readings that nobody here asked for
let base = null;
let readings = 0;
let soon = null;

const playground = startPlayground({ refused, answered: () => load.changed() });
const adapters = startAdapters({ refused, changed: refresh });
const load = startLoad({ refused, reached, storeChanged: refreshSoon });

/** A key is missing or wrong: show where it goes. */
function refused(error) {
  if (error.status !== 401) return;
  byId("access").open = true;
  reached("This server needs an API key");
}

function reached(problem) {
  say(health, problem ?? "Ready");
  health.classList.toggle("problem", Boolean(problem));
}

/** Read anew who can be asked. */
async function refresh() {
  const mine = ++readings;
  let models, list;
  try {
    [models, list] = await Promise.all([call("GET", "v1/models"), call("GET", "v1/adapters")]);
  } catch (error) {
    if (mine !== readings) return;
    refused(error);
    if (error.status !== 401) reached(error.message);
    note(byId("adapters-note"), error.message, { problem: true });
    return;
  }
  if (mine !== readings) return; // a later reading is on its way
  const found = models.data.find((model) => model.parent === null);
  if (base !== found.id) {
    base = found.id;
    document.title = `${base} · lorakit`;
    say(byId("base"), base);
  }
  reached(null);
  if (byId("adapters-note").classList.contains("problem")) note(byId("adapters-note"), "");
  playground.show(base, list.data);
  adapters.show(list.data);
}

/** Under load the adapters' counts change all the time. */
function refreshSoon() {
  soon ??= setTimeout(() => {
    soon = null;
    refresh();
  }, PAUSE);
}

function useKey(key) {
  apiKey.set(key);
  byId("key").value = key;
  byId("access").open = false;
  load.restart();
  refresh();
}

byId("key").value = apiKey.get();
byId("access-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(byId("key").value.trim());
});
byId("forget-key").addEventListener("click", () => useKey(""));
byId("refresh").addEventListener("click", refresh);
// Adapters that came into the folder while nobody looked.
document.addEventListener("visibilitychange", () => document.hidden || refresh());

load.restart();
refresh();
