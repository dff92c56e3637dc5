// Picture and sound of a WebRTC connection in step. Browsers align them, but leave them up to 30 ms apart, or more, for minutes.

const EVERY_MS = 1000;
// What pictures wait at least; sound waits no longer than the network makes necessary. Its buffer and the device still take that
// much, for which browsers let the picture wait, but only after some 15 s if they are not told at once.
const PICTURE_MS = 65;
const SEEN = 3; // looks, of whose differences the median counts
const SHARE = 0.3; // of the difference that is corrected at each
const NEAR_MS = 4; // as good as in step
const MOST_MS = 200;

/** Steer how long what `connection` receives waits in its buffers, until it closes. Before its tracks are there. */
export function keepInStep(connection) {
  let hold = 0; // ms by which pictures are held back; if negative, sound is
  let early = []; // ms by which pictures were ahead of their sound, the newest last
  const steer = () => {
    for (const receiver of connection.getReceivers()) {
      receiver.jitterBufferTarget =
        receiver.track.kind === "video" ? PICTURE_MS + Math.max(hold, 0) : Math.max(-hold, 0);
    }
  };
  const look = async () => {
    if (connection.connectionState === "closed") return clearInterval(timer);
    const at = {};
    for (const { type, kind, estimatedPlayoutTimestamp } of (await connection.getStats()).values()) {
      if (type === "inbound-rtp" && estimatedPlayoutTimestamp) at[kind] = estimatedPlayoutTimestamp;
    }
    if (!at.video || !at.audio) return;
    early = [...early, at.video - at.audio].slice(-SEEN);
    const middle = [...early].sort((a, b) => a - b)[SEEN >> 1];
    if (early.length < SEEN || Math.abs(middle) < NEAR_MS) return;
    hold = Math.max(-MOST_MS, Math.min(MOST_MS, hold + SHARE * middle));
    steer();
  };
  connection.addEventListener("track", steer);
  const timer = setInterval(look, EVERY_MS);
}
