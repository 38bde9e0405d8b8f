// The adapters: what each is, and loading, unloading and pinning them.

import { adapterPath, call } from "./api.js";
import { announce, byId, bytes, counted, make, note, say } from "./dom.js";

const MOST_ROWS = 100;
const FILTER_FROM = 12; // rows
const STATES = { disk: "on disk", host: "in memory", prepared: "ready" };

export function startAdapters({ refused, changed }) {
  const rows = new Map(); // name -> its row: kept over updates, so that the focus stays where it is
  const sources = new Map(); // name -> the path that this page loaded it from
  let list = [];

  function show(entries) {
    list = entries;
    byId("filter-row").hidden = entries.length < FILTER_FROM;
    const wanted = byId("filter-row").hidden ? "" : byId("filter").value.trim().toLowerCase();
    const fitting = entries.filter((entry) => entry.id.toLowerCase().includes(wanted));
    const shown = fitting.slice(0, MOST_ROWS);
    const names = new Set(shown.map((entry) => entry.id));
    for (const [name, row] of rows) {
      if (!names.has(name)) {
        row.element.remove();
        rows.delete(name);
      }
    }
    shown.forEach((entry, place) => {
      const row = rows.get(entry.id) ?? newRow(entry.id);
      rows.set(entry.id, row);
      row.update(entry);
      const there = byId("adapters").children[place];
      if (there !== row.element) byId("adapters").insertBefore(row.element, there ?? null);
    });
    say(byId("adapters-count"), entries.length ? String(entries.length) : "");
    const left = fitting.length - shown.length;
    const empty = entries.length ? "No name contains this." : "There are none yet.";
    say(byId("more"), left ? `${counted(left, "more", "more")}: filter by name to see them.` : fitting.length ? "" : empty);
  }

  function newRow(name) {
    const state = make("span", { class: "state" });
    const facts = make("p", { class: "facts soft small" });
    const pin = make("button", { type: "button", class: "quiet" });
    const move = make("button", { type: "button", class: "quiet" });
    const element = make(
      "li",
      { "data-name": name },
      make("div", { class: "title-row" }, make("span", { class: "name", title: name }, name), state),
      facts,
      make("div", { class: "row-actions" }, pin, move),
    );
    const row = { element, entry: null, update };
    pin.addEventListener("click", () => act(row, pin, () => setPinned(row.entry)));
    move.addEventListener("click", () => act(row, move, () => (row.entry.tier === "disk" ? read(row.entry) : unload(row.entry))));

    function update(entry) {
      row.entry = entry;
      say(state, STATES[entry.tier] + (entry.pinned ? ", pinned" : ""));
      state.dataset.tier = entry.tier;
      const parts = [
        entry.alias_of && `alias of ${entry.alias_of}`,
        entry.version > 1 && `version ${entry.version}`,
        entry.rank !== null && `rank ${entry.rank}`,
        bytes(entry.bytes),
        entry.digest?.slice(0, 8),
        counted(entry.hits, "request"),
        entry.in_flight && `${entry.in_flight} now`,
      ];
      say(facts, parts.filter(Boolean).join(" · "));
      if (entry.digest) facts.title = `sha256 ${entry.digest}`;
      label(pin, entry.pinned ? "Unpin" : "Pin", name);
      label(move, entry.tier === "disk" ? "Load" : "Unload", name);
    }
    return row;
  }

  async function act(row, button, action) {
    button.disabled = true;
    await attempt(action);
    button.disabled = false;
    if (document.activeElement === document.body) button.focus(); // a disabled button loses the focus
  }

  async function attempt(action) {
    try {
      const done = await action();
      note(byId("adapters-note"), "");
      byId("adapters-note").append(...[done].flat());
      await changed();
      return true;
    } catch (error) {
      note(byId("adapters-note"), error.message, { problem: true });
      refused(error);
      return false;
    }
  }

  // A request may have had an adapter read since the list was.
  const now = (entry) => call("GET", adapterPath(entry.id));

  async function setPinned(entry) {
    if ((await now(entry)).digest === null) {
      await post(entry.id, { pinned: true });
    } else {
      await call("POST", adapterPath(entry.id, "/pin"), { pinned: !entry.pinned });
    }
    return `${entry.id} is ${entry.pinned ? "no longer pinned" : "pinned"}.`;
  }

  async function read(entry) {
    const { tier, digest } = await now(entry);
    if (tier === "disk") await post(entry.id, { if_exists: digest === null ? "error" : "replace" });
    return `${entry.id} is loaded.`;
  }

  async function unload(entry) {
    const report = await call("DELETE", adapterPath(entry.id));
    const back = make("button", { type: "button", class: "quiet" }, "Load it again");
    back.addEventListener("click", () =>
      attempt(async () => `${(await post(entry.id, { pinned: entry.pinned })).id} is loaded again.`),
    );
    const left = report.in_flight ? `; ${counted(report.in_flight, "request")} with it will be completed` : "";
    announce(`${entry.id} is unloaded.`);
    return [`${entry.id} is unloaded${left}. `, back];
  }

  function post(name, more) {
    const source = sources.get(name);
    return call("POST", "v1/adapters", { name, ...(source ? { source } : {}), ...more });
  }

  byId("filter").addEventListener("input", () => show(list));
  byId("load-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = event.submitter ?? event.target.querySelector("button");
    const name = byId("load-name").value.trim();
    const source = byId("load-source").value.trim();
    button.disabled = true;
    const done = await attempt(async () => {
      const before = sources.get(name);
      if (source) sources.set(name, source);
      else sources.delete(name);
      try {
        const loaded = await post(name, {
          pinned: byId("load-pinned").checked,
          if_exists: byId("load-replace").checked ? "replace" : "error",
        });
        return `${loaded.id} is loaded as version ${loaded.version}.`;
      } catch (error) {
        if (before) sources.set(name, before);
        else sources.delete(name);
        throw error;
      }
    });
    button.disabled = false;
    if (done) event.target.reset();
    byId("load-name").focus();
  });
  return { show };
}

function label(button, text, name) {
  say(button, text);
  button.setAttribute("aria-label", `${text} ${name}`);
}
