/** The live page: what the router tells once a second, shown until the tab is closed. */

import { WrongToken, ask, forgetToken, knownToken, rememberToken } from "./access.js";
import { Fields } from "./dom.js";
import { Fleet } from "./fleet.js";
import { eventData } from "./stream.js";
import { Requests } from "./requests.js";
import { Summary } from "./summary.js";
import { TryPrompt } from "./try.js";

const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 8000;

const page = new Fields(document);
const access = document.getElementById("access");
const live = document.getElementById("live");
const views = [new Summary(page), new Fleet(page), new Requests(), new TryPrompt(page)];

access.addEventListener("submit", (event) => {
  event.preventDefault();
  rememberToken(access.token.value.trim());
  access.reset();
  page.text("access-error", "");
  follow();
});
window.addEventListener("hashchange", () => {
  if (knownToken() && live.hidden) follow();
});
if (knownToken()) follow();
else demandToken("");

function demandToken(why) {
  forgetToken();
  page.text("access-error", why);
  page.text("connection", "not connected");
  access.hidden = false;
  live.hidden = true;
  access.token.focus();
}

/** Shows every state that comes, and connects again when the stream ends, until the token is refused. */
async function follow() {
  access.hidden = true;
  let retryMs = FIRST_RETRY_MS;
  for (;;) {
    try {
      const response = await ask("events");
      if (!response.ok) throw new Error(`HTTP ${response.status}`);
      for await (const data of eventData(response)) {
        show(JSON.parse(data));
        retryMs = FIRST_RETRY_MS;
      }
    } catch (error) {
      if (error instanceof WrongToken) return demandToken(error.message);
      if (!(error instanceof TypeError)) console.error(error); // a TypeError: the server is not there
    }
    page.text("connection", "connection lost, trying again");
    document.body.dataset.connection = "lost";
    await new Promise((resolve) => setTimeout(resolve, retryMs));
    retryMs = Math.min(2 * retryMs, LAST_RETRY_MS);
  }
}

function show(state) {
  page.text("connection", "live");
  document.body.dataset.connection = "live";
  live.hidden = false;
  for (const view of views) view.update(state);
}
