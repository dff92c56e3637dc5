// The list of jobs that the service still knows.

import { ended, getJson, request, videoOf } from "./api.js";
import { $, $$, h, seconds, session } from "./dom.js";

const STATES = {
  queued: "○ waiting",
  running: "● running",
  succeeded: "✓ done",
  failed: "✕ failed",
  cancelled: "– cancelled",
};
const PAGE = 10;
const LABEL_CHARS = 80;

/** Remember in this tab what a job was about; the service does not tell texts. */
export function label(id, text) {
  session.set(`job-${id}`, text.length > LABEL_CHARS ? `${text.slice(0, LABEL_CHARS - 1).trimEnd()}…` : text);
}

export class History {
  constructor(onShow, onDeleted) {
    this.onShow = onShow;
    this.onDeleted = onDeleted;
    this.next = null;
    $("#history-refresh").addEventListener("click", () => this.load());
    $("#history-more").addEventListener("click", () => this.load(this.next));
  }

  /** Show the newest jobs, or add the older ones at `address`. */
  async load(address = null) {
    let told;
    try {
      told = await getJson(address ?? `jobs?limit=${PAGE}`);
    } catch (error) {
      this.trouble(error);
      return;
    }
    this.trouble(null);
    const items = told.jobs.filter((job) => job.kind !== "avatar").map((job) => this.item(job));
    const held = document.activeElement?.closest("#jobs li") && document.activeElement.getAttribute("aria-label");
    if (address) $("#jobs").append(...items);
    else $("#jobs").replaceChildren(...items);
    if (held) $$("#jobs [aria-label]").find((one) => one.getAttribute("aria-label") === held)?.focus();
    this.next = told.next;
    $("#history-more").hidden = !told.next;
    $("#history-hint").textContent = $("#jobs").children.length ? "" : "Nothing was made yet.";
  }

  trouble(error) {
    $("#history-error").textContent = error ? `The jobs cannot be listed. ${error.message}` : "";
    $("#history-error").hidden = !error;
  }

  item(job) {
    const when = new Date(job.created);
    const said = session.get(`job-${job.id}`);
    const facts = [when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })];
    if (job.seconds !== null) facts.push(seconds(job.seconds));
    if (job.error) facts.push(job.error.message);
    const name = said ?? `Job ${job.id.slice(0, 8)}`;
    const about = (verb) => `${verb}: ${name}, ${facts[0]}`;
    const actions = [];
    if (job.state !== "cancelled") {
      actions.push(h("button", { type: "button", class: "quiet", "aria-label": about("Show"), onclick: () => this.onShow(job) }, "Show"));
    }
    if (job.state === "succeeded") {
      const link = { class: "button quiet", href: videoOf(job), download: true, "aria-label": about("Download") };
      actions.push(h("a", link, "Download"));
    }
    const remove = h("button", { type: "button", class: "quiet danger", "aria-label": about("Delete") }, "Delete");
    remove.addEventListener("click", () => this.remove(job, remove));
    actions.push(remove);
    return h(
      "li",
      { "data-id": job.id },
      h("span", { class: "state", "data-state": job.state }, STATES[job.state]),
      h("span", { class: "what" }, name, h("small", {}, facts.join(" · "))),
      ...actions,
    );
  }

  async remove(job, button) {
    if (!ended(job) && !window.confirm("This job has not ended. Stop and delete it?")) return;
    button.disabled = true;
    try {
      await request(`jobs/${job.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.status !== 404) {
        button.disabled = false;
        this.trouble(error);
        return;
      }
    }
    const item = button.closest("li");
    const beside = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    (beside ? $("button", beside) : $("#history-refresh")).focus();
    if (!beside) $("#history-hint").textContent = "Nothing was made yet.";
    this.onDeleted(job.id);
  }
}
