"use strict";

// What a door says of itself: [class, words].
async function ask(door) {
    let answer;
    try {
        answer = await fetch(door.dataset.health, { cache: "no-store", signal: AbortSignal.timeout(8000) });
    } catch {
        return ["bad", "does not answer"];
    }
    if (answer.status === 401) return ["good", "running, asks for a password"];
    if (answer.status === 429) return ["", "asked too often just now"];
    if (!answer.ok) return ["bad", [502, 504].includes(answer.status) ? "not there; it may be starting" : `error ${answer.status}`];
    if (!(answer.headers.get("Content-Type") || "").includes("json")) return ["good", "running"];
    const told = await answer.json();
    if (told.ready === false) return ["", "running, no model yet"];
    return ["good", told.model ? `serves ${told.model}, version ${told.version}` : "running"];
}

async function look() {
    const doors = [...document.querySelectorAll(".door")];
    const states = await Promise.all(doors.map(async (door) => {
        const [kind, words] = await ask(door);
        const state = door.querySelector(".state");
        state.className = `state ${kind}`;
        state.textContent = words;
        return kind;
    }));
    const good = states.filter((kind) => kind === "good").length;
    document.getElementById("summary").textContent =
        good === doors.length ? "All services are running." : `${good} of ${doors.length} services are ready.`;
}

look();
setInterval(() => document.hidden || look(), 10000);
