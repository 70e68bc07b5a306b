/** Server-sent events of a `fetch`, because EventSource cannot send a token in a header. */

/** The data of every event of a response, as text. */
export async function* eventData(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ")) yield event.slice("data: ".length);
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading ends the request; it may have ended by itself
  }
}
