// Asking the server: plain calls, streams of events, and the API key that goes with both.

const KEY = "lorakit-api-key";

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

/** What the server said went wrong, in its own words. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function send(method, path, body, signal) {
  const headers = {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const key = apiKey.get();
  if (/[^\x20-\x7e]/.test(key)) throw new ApiError("The API key holds a character that keys cannot have.", 401);
  if (key) headers["Authorization"] = `Bearer ${key}`;
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer.");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let told;
  try {
    told = JSON.parse(text).error;
  } catch {
    told = null; // something between here and the server spoke
  }
  throw new ApiError(told?.message ?? `${answer.status} ${answer.statusText}`, answer.status, told?.code ?? null);
}

/** One request and its answer as JSON. */
export async function call(method, path, body) {
  return (await send(method, path, body)).json();
}

/** The path of an adapter; its name may hold slashes, which stay what they are. */
export function adapterPath(name, action = "") {
  return `v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}${action}`;
}

/**
 * A streamed answer.
 *
 * @param {(headers: Headers) => void} opened Called when the first byte of the answer has come.
 * @yields {object} The events.
 */
export async function* stream(path, body, signal, opened) {
  const answer = await send("POST", path, body, signal);
  opened(answer.headers);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) throw new ApiError("The answer broke off before its end.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const said = JSON.parse(data);
        if (said.error) throw new ApiError(said.error.message, answer.status, said.error.code);
        yield said;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // an aborted stream is closed already
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection broke before the answer was complete.");
  }
}
