/** The bars of a request's report. */

const KINDS = {
  "router queue": "queue",
  "prefill queue": "queue",
  prefill: "prefill",
  prompt: "prefill",
  transfer: "exposed",
  decode: "decode",
};
const NAMES = { transfer: "transfer, exposed" };

/** For a `Waterfall`; what still lasts ends at `now_s`. */
export function stagesOf(report, now_s) {
  const stages = report.stages.map((stage) => ({ ...stage, kind: KINDS[stage.name] ?? "queue" }));
  for (const attempt of report.attempts) addHidden(stages, attempt);
  return stages.map(({ name, attempt, kind, start_s, end_s }) => ({
    name: (NAMES[name] ?? name) + (attempt > 1 ? ` (attempt ${attempt})` : ""),
    kind,
    start_s,
    end_s: Math.max(start_s, end_s ?? now_s),
  }));
}

/** What of the KV's way lay beside the computation, which reports tell of each attempt but not as a stage. */
function addHidden(stages, attempt) {
  const hidden_s = attempt.transfer?.hidden_s;
  const index = stages.findIndex((stage) => stage.name === "prefill" && stage.attempt === attempt.number);
  if (!hidden_s || index < 0) return;
  const end_s = stages[index].end_s;
  const name = "transfer, hidden";
  stages.splice(index + 1, 0, { name, attempt: attempt.number, kind: "hidden", start_s: end_s - hidden_s, end_s });
}
