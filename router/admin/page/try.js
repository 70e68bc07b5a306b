/** A prompt sent through the router's own API, its tokens as they come, and when they came. */

import { ask } from "./access.js";
import { duration, plural } from "./format.js";
import { stagesOf } from "./stages.js";
import { eventData } from "./stream.js";
import { Waterfall } from "./waterfall.js";

const API = "api/v1/";
const END = "[DONE]";

export class TryPrompt {
  #running = null; // aborts the request that is being answered
  #takes = "chat";
  #model = "";

  /** @param {import("./dom.js").Fields} page */
  constructor(page) {
    this.page = page;
    this.form = document.getElementById("try");
    this.answer = document.getElementById("answer");
    this.stop = document.getElementById("stop");
    this.here = new Waterfall(document.getElementById("try-here"), "When tokens came to this browser");
    this.there = new Waterfall(document.getElementById("try-there"), "When what happened at the router");
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    this.form.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    this.stop.addEventListener("click", () => this.#running?.abort());
  }

  update(state) {
    this.#takes = state.takes;
    this.#model = state.model;
  }

  async #send() {
    this.#running?.abort();
    const running = (this.#running = new AbortController());
    const times = new Times();
    this.answer.textContent = "";
    this.here.update([]);
    this.there.update([]);
    this.stop.disabled = false;
    this.page.text("try-status", "Waiting for the first token");
    try {
      const requestId = await this.#stream(running.signal, times);
      this.page.text("try-status", `Complete: ${times.summary()}`);
      await this.#showReport(requestId, running.signal);
    } catch (error) {
      if (running !== this.#running) return; // another one has begun
      const isStopped = running.signal.aborted;
      this.page.text("try-status", isStopped ? `Stopped: ${times.summary()}` : `Failed: ${error.message}`);
    }
    this.stop.disabled = true;
  }

  /** Returns the request's id when the answer is complete. */
  async #stream(signal, times) {
    const [path, body] = this.#request();
    const response = await ask(API + path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const data of eventData(response)) {
      if (data === END) return response.headers.get("x-request-id");
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) this.#add(choice, times);
    }
    throw new Error("The answer broke off.");
  }

  /** The path and the body that suit the model. */
  #request() {
    const { form } = this;
    const sampling = {
      model: this.#model,
      max_tokens: form["max-tokens"].valueAsNumber,
      temperature: form.temperature.valueAsNumber,
      stream: true,
      return_token_ids: true,
    };
    const prompt = form.prompt.value;
    if (this.#takes === "chat") {
      return ["chat/completions", { ...sampling, messages: [{ role: "user", content: prompt }] }];
    }
    const isTokens = this.#takes === "tokens";
    return ["completions", { ...sampling, prompt: isTokens ? prompt.match(/\d+/g)?.map(Number) ?? [] : prompt }];
  }

  #add(choice, times) {
    const text = choice.text ?? choice.delta?.content ?? "";
    const ids = choice.token_ids ?? [];
    const shown = this.#takes === "tokens" ? ids.map((id) => `${id} `).join("") : text;
    if (shown) this.answer.append(shown);
    times.tokens(ids.length);
    this.here.update(times.stages());
  }

  /** What the router knows of it. */
  async #showReport(requestId, signal) {
    const response = await ask(`requests/${encodeURIComponent(requestId)}`, { signal });
    if (!response.ok) return; // forgotten already
    const report = await response.json();
    this.there.update(stagesOf(report, report.last_token_s ?? 0));
  }
}

/** When tokens arrived at this browser. */
class Times {
  #sentAt = performance.now();
  #firstAt = null;
  #lastAt = null;
  #numTokens = 0;

  tokens(number) {
    if (!number) return;
    this.#lastAt = performance.now();
    this.#firstAt ??= this.#lastAt;
    this.#numTokens += number;
  }

  stages() {
    if (this.#firstAt === null) return [];
    const first_s = (this.#firstAt - this.#sentAt) / 1000;
    const last_s = (this.#lastAt - this.#sentAt) / 1000;
    return [
      { name: "To the first token", kind: "prefill", start_s: 0, end_s: first_s },
      { name: "Further tokens", kind: "decode", start_s: first_s, end_s: last_s },
    ];
  }

  summary() {
    if (this.#firstAt === null) return "no token";
    const between = this.#numTokens > 1 ? (this.#lastAt - this.#firstAt) / 1000 / (this.#numTokens - 1) : null;
    const pace = between === null ? "" : `, ${duration(between)} per further token`;
    return `${plural(this.#numTokens, "token")}, the first after ${duration(this.stages()[0].end_s)}${pace}`;
  }
}
